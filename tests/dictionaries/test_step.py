"""The hand-written gradients against autograd, and what each update rule leaves alone.

`dense_loss` is the textbook computation, with dense codes and autograd for everything. Losses of
Matryoshka and JumpReLU are also compared with SAELens, where it is installed (extra `bench`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musicscope.dictionaries import step as step_module
from musicscope.dictionaries.core import TopKSAE, _by_topk, in_two_stages, largest_k
from musicscope.dictionaries.step import (
    RULES,
    Aux,
    Jump,
    Weights,
    gradients,
    initial_state,
    join,
    resample,
    select,
    select_of_batch,
    split,
    step,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

WIDTHS, F, B, K = (24, 16, 40), 192, 64, 6


def dense_loss(weights, xs, drawn, k, aux, activation="topk"):
    own, D = weights[drawn], sum(x.shape[1] for x in xs) / len(xs)
    z = torch.relu((xs[drawn] - own.b_dec) @ own.W_enc.T + own.b_enc)
    if activation == "topk":
        best = z.topk(k).indices
        codes = torch.zeros_like(z).scatter(1, best, z.gather(1, best))
    else:
        codes = z * (z >= z.flatten().topk(len(z) * k).values.min())
    loss = 0.0
    for x, model in zip(xs, weights, strict=True):
        error = x - (codes @ model.W_dec + model.b_dec)
        loss = loss + error.square().sum() / (len(x) * D)
        if aux is not None:
            residual = error.detach()
            dead = torch.full_like(z, -torch.inf)
            dead[:, aux.dead] = z[:, aux.dead]
            best = dead.topk(aux.k).indices
            kept = torch.zeros_like(z).scatter(1, best, z.gather(1, best))
            miss = (kept @ model.W_dec - residual).square().sum()
            loss = loss + aux.weight * miss / (residual - residual.mean(0)).square().sum()
    return loss


def random_weights(dtype, widths=WIDTHS, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype).to(device)  # noqa: E731
    unit = lambda w: torch.nn.functional.normalize(w, dim=1)  # noqa: E731
    weights = tuple(
        Weights(draw(F, d) / d**0.5, 0.1 * draw(F), unit(draw(F, d)), 0.3 * draw(d)) for d in widths
    )
    return weights, [draw(B, d) + 0.5 for d in widths]


@pytest.mark.parametrize(
    ("rule", "activation", "widths"),
    [
        ("paper", "topk", WIDTHS[:1]),
        ("paper", "batchtopk", WIDTHS[:1]),
        ("paper", "topk", WIDTHS),
        ("all_decoders", "topk", WIDTHS),
    ],
    ids=["sae", "batchtopk sae", "paper", "all decoders"],
)
@pytest.mark.parametrize(
    ("n_dead", "aux_k"), [(0, 0), (5, 12), (40, 12)], ids=["no aux", "few dead", "many dead"]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"]
)
def test_gradients_equal_autograd(
    rule, activation, widths, n_dead, aux_k, dtype, tolerance, device
):
    """One model, or three of different widths; the drawn encoder and the decoders of the rule."""
    weights, xs = random_weights(dtype, widths, device=device)
    drawn, models = min(1, len(widths) - 1), len(widths)
    dead = torch.arange(3, 3 + n_dead, device=device)
    aux = Aux(dead, min(aux_k, n_dead), 1 / 32) if n_dead else None
    leaves = tuple(Weights(*(w.clone().requires_grad_() for w in model)) for model in weights)
    loss = dense_loss(leaves, xs, drawn, K, aux, activation)
    loss.backward()
    found = gradients(weights, xs, K, activation, drawn, RULES[rule](drawn, models), aux)
    total = found.losses.sum() + (aux.weight * found.aux_loss if aux else 0.0)
    torch.testing.assert_close(total, loss.detach(), rtol=tolerance, atol=tolerance)
    for j, (ours, model) in enumerate(zip(found.gradients, leaves, strict=True)):
        learns = {"W_enc": j == drawn, "b_enc": j == drawn}
        learns |= dict.fromkeys(("W_dec", "b_dec"), rule == "all_decoders" or j == drawn)
        for name, gradient, leaf in zip(Weights._fields, ours, model, strict=True):
            assert (gradient is not None) == learns[name], (j, name)
            if gradient is not None:
                scale = leaf.grad.abs().max()
                assert scale > 0
                assert (gradient - leaf.grad).abs().max() <= tolerance * max(1.0, scale.item())


PREFIXES = (16, 60)
JUMP = {"bandwidth": 0.4, "weight": 0.02}


def on_batch(x, own, k, activation, threshold=None):
    """Dense codes and the sparsity loss; straight through the step within the bandwidth."""
    z = (x - own.b_dec) @ own.W_enc.T + own.b_enc
    if activation == "topk":
        best = z.topk(k).indices
        return torch.zeros_like(z).scatter(1, best, z.gather(1, best)).relu(), 0.0
    if activation == "batchtopk":
        return z * ((z >= z.flatten().topk(len(z) * k).values.min()) & (z > 0)), 0.0
    distance, width = z - threshold, JUMP["bandwidth"]
    ramp = (distance.detach().abs() < width / 2) / width * distance
    through = ramp - ramp.detach()
    codes = z * (distance > 0) + threshold.detach() * through
    count = ((distance > 0) + through).sum(1)
    return codes, JUMP["weight"] * (2 / k * (count - k).square()).mean()


def random_thresholds():
    return torch.rand(F, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("prefixes", [(), PREFIXES], ids=["flat", "matryoshka"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_gradients_of_prefixes_and_thresholds_equal_autograd(activation, prefixes):
    weights, (x,) = random_weights(torch.float64, (24,))
    leaf = Weights(*(w.clone().requires_grad_() for w in weights[0]))
    threshold = random_thresholds().requires_grad_()
    codes, sparsity = on_batch(x, leaf, K, activation, threshold)
    errors = [x - codes[:, :n] @ leaf.W_dec[:n] - leaf.b_dec for n in (*prefixes, F)]
    (sum(e.square().mean() for e in errors) + sparsity).backward()
    jump = Jump(threshold.detach(), **JUMP) if activation == "jumprelu" else None
    found = gradients(weights, [x], K, activation, prefixes=prefixes, jump=jump)
    equal = torch.testing.assert_close
    equal(found.losses[0], errors[-1].square().mean().detach())
    if prefixes:
        equal(found.prefix_loss, sum(e.square().mean() for e in errors[:-1]).detach())
    for name, gradient, wanted in zip(Weights._fields, found.gradients[0], leaf, strict=True):
        equal(gradient, wanted.grad, rtol=1e-10, atol=1e-13, msg=name)
    if jump:
        equal(found.sparsity_loss, sparsity.detach())
        equal(found.threshold, threshold.grad, rtol=1e-10, atol=1e-13)
        assert (found.threshold != 0).any()
    active = torch.zeros(B, F, dtype=torch.bool)
    rows = torch.arange(B).repeat_interleave(found.codes.crow.diff())
    active[rows, found.codes.columns.long()] = found.codes.values > 0
    assert torch.equal(active, codes > 0)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka", "jumprelu"])
def test_loss_and_gradients_equal_those_of_saelens(kind):
    """Its loss is summed over dimensions, ours is a mean."""
    pytest.importorskip("sae_lens")
    from sae_lens import saes
    from sae_lens.saes.sae import TrainStepInput

    d = 24
    weights, (x,) = random_weights(torch.float64, (d,))
    name, settings = {
        "batchtopk": ("BatchTopK", {"k": K, "rescale_acts_by_decoder_norm": False}),
        "matryoshka": (
            "MatryoshkaBatchTopK",
            {"k": K, "rescale_acts_by_decoder_norm": False, "matryoshka_widths": [*PREFIXES, F]},
        ),
        "jumprelu": (
            "JumpReLU",
            {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": K,
             "jumprelu_bandwidth": JUMP["bandwidth"], "jumprelu_ste_to_input": True},
        ),
    }[kind]  # fmt: skip
    config = getattr(saes, f"{name}TrainingSAEConfig")(d_in=d, d_sae=F, dtype="float64", **settings)
    sae = getattr(saes, f"{name}TrainingSAE")(config)
    threshold = random_thresholds()
    if kind == "jumprelu":
        sae.threshold.data = threshold.clone()
    for weight, value in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), weights[0], strict=True):
        weight.data = value.T.clone() if weight is sae.W_enc else value.clone()
    out = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            dead_neuron_mask=None,
            coefficients={"l0": JUMP["weight"] * d},
            n_training_steps=0,
            is_logging_step=False,
        )  # fmt: skip
    )
    (out.loss / d).backward()
    jump = Jump(threshold, **JUMP) if kind == "jumprelu" else None
    activation = "jumprelu" if jump else "batchtopk"
    prefixes = PREFIXES if kind == "matryoshka" else ()
    found = gradients(weights, [x], K, activation, prefixes=prefixes, jump=jump)
    total = found.losses.sum() + found.prefix_loss + found.sparsity_loss
    torch.testing.assert_close(total, out.loss.detach() / d)
    wanted = [sae.W_enc.grad.T, sae.b_enc.grad, sae.W_dec.grad, sae.b_dec.grad]
    ours = list(found.gradients[0])
    if jump:
        wanted, ours = [*wanted, sae.threshold.grad], [*ours, found.threshold]
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_thresholds_learn_and_stay_at_or_above_zero():
    state = initial_state(F, (24,), 3, "cpu", threshold=0.01)
    x = random_weights(torch.float32, (24,))[1][0]
    for _ in range(20):
        step(state, [x], 1e-2, K, "jumprelu", bandwidth=0.3, sparsity_weight=0.1)
    assert (state.threshold >= 0).all()
    assert (state.threshold > 0.05).any()


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_resampling_restarts_dead_latents_on_the_errors_and_leaves_the_others_alone(activation):
    jump = activation == "jumprelu"
    state = initial_state(F, (24,), 3, "cpu", threshold=0.5 if jump else None)
    x = random_weights(torch.float32, (24,))[1][0]
    for _ in range(3):
        step(state, [x], 1e-2, K, activation, bandwidth=0.5, sparsity_weight=0.01)
    dead = torch.tensor([5, 90])
    state.unfired[:] = 0
    state.unfired[dead] = 10**6
    before, thresholds = snapshot(state), state.threshold.clone() if jump else None
    resample(state, x, K, activation, 10**6, seed=0)
    live = torch.ones(F, dtype=torch.bool)
    live[dead] = False
    for key, parts in snapshot(state).items():
        for i, (old, new) in enumerate(zip(before[key], parts, strict=True)):
            if new.ndim and len(new) == F:
                assert torch.equal(old[live], new[live]), key
                assert not new[dead].any() if i else not torch.equal(old[dead], new[dead]), key
    own = state.weights[0]
    torch.testing.assert_close(own.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(
        own.W_enc[dead].norm(dim=1), 0.2 * own.W_enc[live].norm(dim=1).mean().expand(2)
    )
    assert not state.unfired.any()
    if jump:  # snapshot leaves the thresholds out
        assert (state.threshold[dead] > 0).all()
        assert (state.threshold[dead] != thresholds[dead]).all()
        assert torch.equal(state.threshold[live], thresholds[live])
        assert not state.optimizer.state[state.threshold]["exp_avg"][dead].any()


def test_latents_at_or_below_zero_get_no_gradient():
    weights, xs = random_weights(torch.float64)
    weights = tuple(w._replace(b_enc=torch.full((F,), -1.6, dtype=torch.float64)) for w in weights)
    leaves = tuple(Weights(*(w.clone().requires_grad_() for w in model)) for model in weights)
    dense_loss(leaves, xs, 0, 40, None).backward()
    found = gradients(weights, xs, 40)
    assert (found.codes.values == 0).any()
    for ours, leaf in zip(found.gradients[0], leaves[0], strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-11, atol=1e-13)


def snapshot(state):
    """Every weight with its Adam moments and step count, by (model, name)."""
    return {
        (j, name): [w.clone(), *copy.deepcopy(list(state.optimizer.state[w].values()))]
        for j, model in enumerate(state.weights)
        for name, w in zip(Weights._fields, model, strict=True)
    }


@pytest.mark.parametrize("rule", RULES)
def test_a_step_changes_what_the_rule_names_and_nothing_else(rule, device):
    state = initial_state(F, WIDTHS, seed=1, device=device)
    xs = [x.float() for x in random_weights(torch.float64, device=device)[1]]
    settings = {"lr": 1e-2, "k": K, "rule": rule, "aux_k": 8, "aux_weight": 1 / 32}
    settings["dead_after"] = 2 * B
    for drawn in (0, 1, 2, 0):  # so that every moment exists
        step(state, xs, drawn=drawn, **settings)
    before = snapshot(state)
    step(state, xs, drawn=1, **settings)
    after = snapshot(state)
    changed = {key for key in before if not all(map(torch.equal, before[key], after[key]))}
    decoders = (1,) if rule == "paper" else (0, 1, 2)
    expected = {(1, "W_enc"), (1, "b_enc")}
    assert changed == expected | {(j, n) for j in decoders for n in ("W_dec", "b_dec")}
    for model in state.weights:
        torch.testing.assert_close(model.W_dec.norm(dim=1).cpu(), torch.ones(F))


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_both_rules_are_the_same_sae_for_one_model(activation):
    """With M = 1 weights are equal to the bit, and so is the loss, a mean per dimension."""
    x = random_weights(torch.float32, (24,))[1][0]
    states = {rule: initial_state(F, (24,), 3, "cpu") for rule in RULES}
    settings = {"aux_k": 8, "aux_weight": 1 / 32, "dead_after": 2 * B}
    for _ in range(5):
        for rule, state in states.items():
            found = step(state, [x], 1e-2, K, activation, rule=rule, **settings)
    for a, b in zip(*(state.weights[0] for state in states.values()), strict=True):
        assert torch.equal(a, b)
    assert found.losses.shape == (1,)


def test_step_counts_silence_whichever_model_is_drawn(device):
    state = initial_state(F, WIDTHS, seed=1, device=device)
    xs = random_weights(torch.float32, device=device)[1]
    silent = torch.ones(F, dtype=torch.bool, device=device)
    for drawn in (0, 2):
        found = step(state, xs, 0.0, 2, drawn=drawn)
        silent[found.codes.columns[found.codes.values > 0].long()] = False
    assert silent.any()
    assert torch.equal(state.unfired == 2 * B, silent)


def test_a_crosscoder_is_the_sum_of_encoders_and_one_decoder_a_model():
    """`split` of the joined SAE computes what the joined SAE does, to the last decode."""
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(B, d, generator=g) for d in WIDTHS]
    state = initial_state(F, [sum(WIDTHS)], 0, "cpu")
    for _ in range(3):
        result = step(state, [join(xs)], 1e-2, K)
    joined = state.weights[0]
    parts = split(joined, WIDTHS)
    z = sum((x - p.b_dec) @ p.W_enc.T + p.b_enc for x, p in zip(xs, parts, strict=True))
    torch.testing.assert_close(z, (join(xs) - joined.b_dec) @ joined.W_enc.T + joined.b_enc)
    norms = sum(p.W_dec.square().sum(1) for p in parts)
    torch.testing.assert_close(norms, torch.ones(F))
    dense = torch.randn(B, F, generator=g)
    out = join([dense @ p.W_dec + p.b_dec for p in parts])
    torch.testing.assert_close(out, dense @ joined.W_dec + joined.b_dec, rtol=1e-5, atol=1e-4)
    assert result.losses.isfinite().all()


def test_aux_leaves_living_latents_and_the_codes_alone():
    weights, xs = random_weights(torch.float64, (16,))
    plain = gradients(weights, xs, 4)
    dead = torch.tensor([7, 50])
    helped = gradients(weights, xs, 4, aux=Aux(dead, 2, 1.0))
    changed = (plain.gradients[0].W_dec != helped.gradients[0].W_dec).any(1)
    assert changed.nonzero().squeeze(1).tolist() == dead.tolist()
    assert torch.equal(plain.codes.values, helped.codes.values)


def test_aux_ignores_the_decoder_bias():
    """Moving b_dec and the data together changes nothing: the bias is not added a second time."""
    weights, (x,) = random_weights(torch.float64, (16,))
    shift = torch.linspace(-1, 1, 16, dtype=torch.float64)
    aux = Aux(torch.arange(10), 4, 1.0)
    moved = weights[0]._replace(b_dec=weights[0].b_dec + shift)
    first = gradients(weights, [x], 4, aux=aux)
    second = gradients([moved], [x + shift], 4, aux=aux)
    torch.testing.assert_close(first.aux_loss, second.aux_loss)


def test_step_keeps_the_decoder_unit_norm_and_counts_silence():
    state = initial_state(128, [16], seed=1, device="cpu")
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    result = step(state, [x], lr=1e-2, k=2)
    torch.testing.assert_close(state.weights[0].W_dec.norm(dim=1), torch.ones(128))
    fired = torch.zeros(128, dtype=torch.bool)
    fired[result.codes.columns[result.codes.values > 0].long()] = True
    assert fired.any()
    assert not fired.all()
    assert torch.equal(state.unfired, torch.where(fired, 0, 64))


def test_step_reports_nan_in_its_loss(device):
    state = initial_state(128, [16], seed=1, device=device)
    x = torch.randn(64, 16, device=device)
    x[3, 2] = torch.nan
    assert torch.isnan(step(state, [x], lr=1e-3, k=4).losses).all()


def test_largest_k_at_the_large_size_and_with_a_nan_row(device):
    z = torch.randn(3, 8192, generator=torch.Generator().manual_seed(0)).to(device)
    z[1] = torch.nan
    for found in (largest_k(z, 32), in_two_stages(z, 32, _by_topk)):
        for row in (0, 2):
            assert set(found[row].tolist()) == set(z[row].topk(32).indices.tolist())


def test_codes_of_a_dictionary_are_those_of_the_cpu(device):
    weights, (x,) = random_weights(torch.float32, (24,))
    sae = TopKSAE(*weights[0], K)
    expected, found = sae.encode(x), sae.to(device).encode(x.to(device))
    plain = [
        torch.zeros(B, F).scatter_(1, indices.cpu(), values.cpu())
        for values, indices in (expected, found)
    ]
    torch.testing.assert_close(*plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        sae.to(device).reconstruct(x.to(device)).cpu(), sae.reconstruct(x), rtol=1e-5, atol=1e-5
    )


def dense(codes, latents=F):
    rows = torch.arange(len(codes.crow) - 1, device=codes.crow.device)
    rows = rows.repeat_interleave(codes.crow.diff())
    out = codes.values.new_zeros(len(codes.crow) - 1, latents)
    out[rows, codes.columns.long()] = codes.values
    return out


@pytest.mark.parametrize("shift", [0.0, -2.5], ids=["plenty above 0", "few above 0"])
def test_batchtopk_in_static_shapes_selects_the_same(shift, device):
    """As on a GPU: B*k entries always, of value 0 where fewer are above 0."""
    z = torch.randn(B, F, generator=torch.Generator().manual_seed(0)).to(device) + shift
    found, plain = select_of_batch(z, K), select(z.cpu(), K, "batchtopk")
    assert len(found.values) == B * K
    assert (len(plain.values) == B * K) == (shift == 0)
    assert found.columns.dtype == found.crow.dtype == torch.int32
    assert torch.equal(dense(found).cpu(), dense(plain))


class NoWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values or shapes that depend on data."""

    REFUSED = ("nonzero", "_local_scalar_dense", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func), kwargs or {}
        assert not any(part in name for part in self.REFUSED), name
        if "repeat_interleave" in name:
            assert kwargs.get("output_size") is not None
        if "aten.index" in name and isinstance(args[1], (list, tuple)):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), name
        return func(*args, **kwargs)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("widths", [WIDTHS[:1], WIDTHS], ids=["sae", "usae"])
def test_a_step_as_on_a_gpu_waits_for_nothing_and_is_the_same(widths, activation, monkeypatch):
    """AuxK included, except where dead latents are listed."""
    xs = [x.float() for x in random_weights(torch.float64, widths)[1]]
    settings = {"aux_k": 8, "aux_weight": 1 / 32, "dead_after": 2 * B}
    states = []
    for as_on_gpu in (False, True):
        if as_on_gpu:
            monkeypatch.setattr(
                step_module, "largest_k", lambda z, k: in_two_stages(z, k, _by_topk)
            )
            monkeypatch.setattr(step_module, "select", (
                lambda z, k, activation, jump: select(z, k, activation)
                if activation == "topk" else select_of_batch(z, k)
            ))  # fmt: skip
        state = initial_state(F, widths, 3, "cpu")
        for _ in range(6):
            result = step(state, xs, 1e-3, K, activation, **settings)
        states.append(state)
    assert len(state.dead)
    assert result.aux_loss > 0
    for ours, gpu in zip(*([w for m in s.weights for w in m] for s in states), strict=True):
        torch.testing.assert_close(ours, gpu, rtol=1e-4, atol=1e-5)
    assert torch.equal(states[0].unfired, states[1].unfired)
    monkeypatch.setattr(step_module, "DEAD_EVERY", {"cpu": 16})
    with NoWaits():
        step(state, xs, 1e-3, K, activation, **settings)


def test_dead_latents_are_listed_every_so_many_steps(monkeypatch):
    monkeypatch.setattr(step_module, "DEAD_EVERY", {"cpu": 3})
    state = initial_state(F, [24], 1, "cpu")
    x = random_weights(torch.float32, (24,))[1]
    listed = []
    for _ in range(7):
        step(state, x, 0.0, 2, aux_k=4, aux_weight=1 / 32, dead_after=B)
        listed.append(len(state.dead))
    silent = int((state.unfired >= B).sum())
    assert listed == [0, 0, 0, silent, silent, silent, silent]
    assert silent > 0


def test_a_step_on_a_gpu_waits_for_nothing(device):
    if device.type != "cuda":
        pytest.skip("waits are counted on a GPU: MUSICSCOPE_TEST_DEVICE=cuda")
    state = initial_state(F, [24], 1, device)
    x = random_weights(torch.float32, (24,), device=device)[1]
    settings = {"aux_k": 4, "aux_weight": 1 / 32, "dead_after": B}
    step(state, x, 1e-3, 2, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(state, x, 1e-3, 2, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
