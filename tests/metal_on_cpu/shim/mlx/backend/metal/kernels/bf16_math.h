// In place of MLX's: the math functions of metal.h take bfloat already.
#pragma once
