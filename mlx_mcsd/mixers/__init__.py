"""Token mixers behind one interface; importing the package registers them all."""

from . import mcsd
from .base import Mixer, State, get, names, register

__all__ = ["Mixer", "State", "get", "mcsd", "names", "register"]
