"""The reference's training form: equal to the quadratic form and the steps, linear, less work."""

import numpy as np
import pytest

import oracle
from oracle import relative_error

torch = pytest.importorskip("torch", reason="the reference needs the convert extra")
torch.set_num_threads(1)
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402 (behind torch)

MATRICES = {"slope": oracle.slope_matrix, "decay": oracle.decay_matrix}
DTYPES = [
    pytest.param(torch.float64, 1e-10, id="float64"),
    pytest.param(torch.float32, 1e-5, id="float32"),
]


class Quadratic:
    """Stands in for a timeline: the N x N matrices of the paper (Eqs. 14, 17), as printed."""

    def __init__(self, C, N, dtype):
        self.matrices = {k: torch.from_numpy(of(N, C)).to(dtype) for k, of in MATRICES.items()}
        self.count = torch.tensor([N])

    def read(self, section, x, h):
        return torch.einsum("cnm,bmcd->bncd", self.matrices[section], x), h


class Steps:
    """Stands in for a timeline: h <- lambda (h + x) a token at a time, rows side by side."""

    def __init__(self, C, mask, reset):
        self.mask, self.reset, self.count = mask, reset, mask.new_zeros(1).long()
        i = torch.arange(1, C + 1, dtype=torch.float64)[:, None]
        self.decays = {"slope": torch.exp(-(2 ** (-8 * i / C))), "decay": 1 - 2 ** (-4 - i)}

    def read(self, section, x, h):
        decay = self.decays[section].to(x.dtype)
        weight, outputs = torch.zeros_like(h[:, :, :1]), []
        for n in range(x.shape[1]):
            real = self.mask[:, n, None, None]
            starts = self.reset[:, n, None, None] & real
            h, weight = torch.where(starts, 0.0, h), torch.where(starts, 0.0, weight)
            empty = weight == 0
            past = h / torch.where(empty, 1.0, weight) if section == "slope" else h
            outputs.append(torch.where(empty, x[:, n], past))
            h = torch.where(real, decay * (h + x[:, n]), h)
            weight = torch.where(real, decay * (weight + 1), weight)
        return torch.stack(outputs, 1), h


def make_mixer(sections, dtype, **sizes):
    """A mixer with projections of size one, so that no section drowns the other."""
    from mlx_mcsd.convert.reference.configuration_mcsd import MCSDConfig
    from mlx_mcsd.convert.reference.modeling_mcsd import MCSDMixer

    mixer = MCSDMixer(MCSDConfig(**sizes, sections=sections, projection="dense"))
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return mixer.to(dtype)


def gradients(mixer, x, timeline, weight):
    """Outputs, and the gradients of their weighted sum by the input and every parameter."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    y, _ = mixer(x, None, timeline)
    (y * weight).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in mixer.parameters())]


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("sections", oracle.SECTIONS, ids="+".join)
@pytest.mark.parametrize("N", [1, 2, 63, 65, 200])
def test_it_is_the_quadratic_form(dtype, tolerance, sections, N):
    mixer = make_mixer(sections, dtype, hidden_size=60, num_channels=3)
    x, weight = torch.randn(2, 2, N, 60, dtype=dtype)
    want = gradients(mixer, x, Quadratic(3, N, dtype), weight)
    for got, expected in zip(gradients(mixer, x, None, weight), want, strict=True):
        assert relative_error(got, expected) < tolerance


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
def test_it_is_the_step_form(dtype, tolerance, masked, packed):
    """Padding anywhere and documents packed in a row: outputs and gradients of the plain loop."""
    rng, N = np.random.default_rng(1), 150
    mixer = make_mixer(["slope", "decay"], dtype, hidden_size=60, num_channels=3)
    x, weight = torch.randn(2, 3, N, 60, dtype=dtype)
    mask = torch.from_numpy(rng.random((3, N)) < 0.7) if masked else torch.ones(3, N) == 1
    reset = torch.from_numpy(rng.random((3, N)) < 0.1) if packed else torch.zeros(3, N) == 1
    weight = weight * mask[..., None]
    want = gradients(mixer, x, Steps(3, mask, reset), weight)
    timeline = mixer.timeline(x, None, mask if masked else None, reset if packed else None)
    for got, expected in zip(gradients(mixer, x, timeline, weight), want, strict=True):
        assert relative_error(got, expected) < tolerance


def kept_bytes(mixer, N):
    """Bytes that a forward pass keeps for the backward one, every storage once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = tensor  # alive, or its address might serve again
        return tensor

    x = torch.randn(1, N, 32, requires_grad=True)
    reset = torch.zeros(1, N, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixer(x, None, mixer.timeline(x, None, None, reset))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_memory_is_linear_in_the_tokens():
    mixer = make_mixer(["slope", "decay"], torch.float32, hidden_size=32, num_channels=2)
    short, long = kept_bytes(mixer, 512), kept_bytes(mixer, 4096)
    assert long < 8.2 * short
    assert long < 4 * 4096**2  # one matrix of N x N floats


def test_at_4096_tokens_it_multiplies_less_than_a_third_of_the_quadratic_form():
    # Counted, since a clock says little on a busy machine.
    mixer = make_mixer(["slope", "decay"], torch.float32, hidden_size=64, num_channels=2)
    x, weight = torch.randn(2, 1, 4096, 64)
    counts = []
    for timeline in (None, Quadratic(2, 4096, torch.float32)):
        with FlopCounterMode(display=False) as counter:
            gradients(mixer, x, timeline, weight)
        counts.append(counter.get_total_flops())
    assert 0 < 3 * counts[0] < counts[1]
