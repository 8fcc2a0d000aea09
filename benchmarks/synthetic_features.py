"""Recovery of known features: our dictionaries and SAELens' on SynthSAEBench at a reduced size.

    python -m benchmarks.synthetic_features      # writes benchmarks/results/synthetic_features.json
    python -m benchmarks.synthetic_features --recipes ours_topk --seeds 0 --data /tmp/synthetic

Activations come from `sae_lens.synthetic` (extra `bench`) with the configuration of
SynthSAEBench-16k (arXiv 2602.14687; decoderesearch/synth-sae-bench-experiments,
experiments/create_synth_bench_16k_model.py): Zipf firing, a hierarchy, low-rank correlations, more
features than dimensions. Only features, dimensions and roots of the hierarchy are fewer (`World`).

Every recipe learns as many latents as there are features, in equally many steps, from the same
activation store, in the order that the seed gives; seeds also change the first weights. Recipes of
SAELens run its own trainer. Scores, by SAELens' definitions, on activations that no recipe saw:

* mcc: mean |cosine| of decoder rows and features under the best one-to-one matching.
* f1: of each latent as a detector of the feature nearest to it, averaged over latents.
* r2: explained variance. l0: active latents per sample.
* dead: share of latents that never fire. unique: features that are nearest to some latent, as a
  share of the latents.

The null is a dictionary of random directions: in few dimensions its MCC is far above 0. A seed that
the record holds already is kept, so a long measurement can be made in parts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402

from benchmarks.records import OUT_HELP, Record, open_record  # noqa: E402
from musicscope.activations.store import ActivationStore, StoreWriter  # noqa: E402
from musicscope.config.dictionaries import TrainSae  # noqa: E402
from musicscope.core.command_line import Parser, run_program, whole  # noqa: E402
from musicscope.core.seeding import seed_for  # noqa: E402
from musicscope.dictionaries.core import TopKSAE  # noqa: E402
from musicscope.dictionaries.data import TRAIN, Paired, pair  # noqa: E402
from musicscope.dictionaries.evaluation import random_sae  # noqa: E402
from musicscope.dictionaries.training import train  # noqa: E402

RESULT = "benchmarks/results/synthetic_features.json"
BATCH, STEPS = 512, 3000
ROWS, CLIPS, TEST_ROWS = 8192, 96, 32_768
"""Training activations per clip of the store, clips, and activations that are scored."""


@dataclass(frozen=True)
class World:
    """The part of SynthSAEBench's configuration that is reduced."""

    features: int = 512
    width: int = 64
    """Dimensions of the activations."""
    roots: int = 4
    """Trees of the hierarchy, 85 features each; the other features are independent."""
    k: int = 5
    """Latents per sample where a recipe names no other: the mean number of active features."""
    seed: int = 42


class Planted(NamedTuple):
    """Activations with known features."""

    features: Tensor
    """[N, d] directions, unit norm"""
    x: Tensor
    """[n, d]"""
    codes: Tensor
    """[n, N] activation of each feature, 0 where it is not active"""


class Learnt(NamedTuple):
    """A trained dictionary, dense."""

    W_dec: Tensor
    """[F, d]"""
    encode: Callable[[Tensor], Tensor]
    """x [n, d] -> codes [n, F]"""
    decode: Callable[[Tensor], Tensor]
    """codes [n, F] -> x' [n, d]"""


def matched_similarity(learnt: Tensor, features: Tensor) -> float:
    """MCC: mean |cosine| of rows [F, d] and [N, d] under the best one-to-one matching."""
    cosine = (normalize(learnt, dim=1) @ normalize(features, dim=1).T).abs().numpy()
    return float(cosine[linear_sum_assignment(cosine, maximize=True)].mean())


@torch.no_grad()
def score(learnt: Learnt, planted: Planted) -> dict[str, float]:
    """Compute the scores that the module names."""
    features, x, true_codes = planted
    nearest = (normalize(learnt.W_dec, dim=1) @ features.T).abs().argmax(1)
    codes = learnt.encode(x)
    active, wanted = codes > 0, true_codes[:, nearest] > 0
    hits = (active & wanted).sum(0).double()
    f1 = 2 * hits / (active.sum(0) + wanted.sum(0)).clamp(min=1)
    error = (x - learnt.decode(codes)).double().square().sum()
    latents = len(learnt.W_dec)
    return {
        "mcc": matched_similarity(learnt.W_dec, features),
        "f1": float(f1.mean()),
        "r2": 1 - float(error / (x - x.mean(0)).double().square().sum()),
        "l0": float(active.sum(1).double().mean()),
        "dead": float((~active.any(0)).double().mean()),
        "unique": len(nearest.unique()) / latents,
    }


# ---- data


def synthetic_model(world: World):
    """SAELens' generator with the configuration of SynthSAEBench-16k, reduced."""
    from sae_lens.synthetic import firing_magnitudes as magnitudes
    from sae_lens.synthetic import synthetic_model as model

    config = model.SyntheticModelConfig(
        num_features=world.features,
        hidden_dim=world.width,
        firing_probability=model.ZipfianFiringProbabilityConfig(
            max_prob=0.4, min_prob=5e-4, exponent=0.5
        ),
        hierarchy=model.HierarchyConfig(
            total_root_nodes=world.roots, branching_factor=4, max_depth=3,
            mutually_exclusive_portion=1.0, mutually_exclusive_min_depth=0,
            compensate_probabilities=True, scale_children_by_parent=True,
        ),
        mean_firing_magnitudes=magnitudes.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=magnitudes.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        correlation=model.LowRankCorrelationConfig(correlation_scale=0.1, rank=25),
        orthogonalization=model.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        bias=0.5,
        seed=world.seed,
    )  # fmt: skip
    return model.SyntheticModel(config)


@torch.no_grad()
def planted_activations(model, world: World) -> Planted:
    """Draw the activations that are scored."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(world.seed, "test"))
        x, codes = model.sample_with_features(TEST_ROWS)
    return Planted(normalize(model.feature_dict.feature_vectors, dim=1), x, codes)


@torch.no_grad()
def training_store(model, world: World, folder: Path) -> ActivationStore:
    """Draw the training activations into a store, unless `folder` holds it already."""
    names = [f"{i:04d}" for i in range(CLIPS)]
    table = pd.DataFrame({"id": names, "group": names, "frames": ROWS})
    writer = StoreWriter(
        folder, width=world.width, dtype="float16", spans=[(i, i + 1) for i in range(CLIPS)],
        clips=table.assign(split=TRAIN, font="", kind="clip"), config={"world": asdict(world)},
    )  # fmt: skip
    if (folder / "manifest.json").exists():
        store = ActivationStore.open(folder)
        if store.manifest["config_sha256"] != writer.config_sha256:
            raise SystemExit(f"{folder} holds another world: give --data another folder")
        return store
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(world.seed, "train"))
        for i in range(CLIPS):
            writer.write(i, [model.sample(ROWS).numpy()])
    return writer.finish()


# ---- recipes


def ours(**changes: Any) -> Callable[[Paired, World, int], Learnt]:
    """Our public trainer with the settings of params.yaml and `changes`."""

    def learn(data: Paired, world: World, seed: int) -> Learnt:
        settings = {
            "k": world.k, "expansion": world.features // world.width, "batch_size": BATCH,
            "samples": BATCH * STEPS, "learning_rate": 3e-3, "warmup_fraction": 0.05,
            "decay_fraction": 0.4, "aux_k_fraction": 0.5, "aux_weight": 1 / 32,
            "dead_after_samples": 200_000, "seeds": 1, "activation": "topk", "ce_clips": 1,
            "matryoshka": (), "resample_every": 0, "bandwidth": 0.5, "sparsity_weight": 0.01,
        }  # fmt: skip
        return dense(train(data, TrainSae(**settings | changes), "sae", seed).dictionary)

    return learn


def saelens(
    architecture: str, lr: float, decay: float = 0.0, dead_steps: int = 1000, **settings: Any
) -> Callable[[Paired, World, int], Learnt]:
    """SAELens' trainer as its train_toy_sae sets it up, on the same batches as ours."""

    def batches(data: Paired, seed: int) -> Iterator[Tensor]:
        for (x,) in data.batches(BATCH, seed_for(seed, "order"), BATCH * STEPS):
            yield torch.from_numpy(x)

    def learn(data: Paired, world: World, seed: int) -> Learnt:
        from sae_lens import SAE, saes
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(seed_for(seed, "saelens"))
        own = {"d_in": world.width, "d_sae": world.features, "k": world.k, **settings}
        config = getattr(saes, f"{architecture}TrainingSAEConfig")(**own)
        sae = getattr(saes, f"{architecture}TrainingSAE")(config)
        trainer = SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, device="cpu",
            total_training_samples=BATCH * STEPS, train_batch_size_samples=BATCH, autocast=False,
            lr=lr, lr_end=lr, lr_scheduler_name="constant", lr_warm_up_steps=0,
            lr_decay_steps=int(decay * STEPS), n_restart_cycles=1, adam_beta1=0.9,
            adam_beta2=0.999, dead_feature_window=dead_steps, feature_sampling_window=2000,
            n_batches_for_norm_estimate=100,
            logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
        )  # fmt: skip
        SAETrainer(cfg=trainer, sae=sae, data_provider=batches(data, seed)).fit()
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            final = SAE.load_from_disk(folder, device="cpu").eval()
        return Learnt(final.W_dec.detach(), final.encode, final.decode)

    return learn


def random_rows(data: Paired, world: World, seed: int) -> Learnt:
    """The null: random unit decoder rows, also the encoder, k largest, one gain fitted."""
    generator = torch.Generator().manual_seed(seed_for(seed, "null"))
    W = normalize(torch.randn(world.features, world.width, generator=generator), dim=1)
    (store,) = data.stores
    mean = torch.tensor(store.mean, dtype=torch.float32)
    plain = TopKSAE(W, torch.zeros(len(W)), W, mean, world.k)
    return dense(random_sae(plain, store.clip(0), seed_for(seed, "null")))


def dense(sae: TopKSAE) -> Learnt:
    """Give an SAE of ours the form that is scored."""

    def encode(x: Tensor) -> Tensor:
        values, indices = sae.encode(x)
        return values.new_zeros(len(x), sae.n_latents).scatter_add_(1, indices, values)

    return Learnt(sae.W_dec, encode, lambda codes: codes @ sae.W_dec + sae.b_dec)


PREFIXES = (16, 64, 256)
OURS = {"learning_rate": 1e-2, "dead_after_samples": 20_000, "k": 8}
SAELENS = {"lr": 3e-3, "decay": 0.2, "dead_steps": 40, "k": 6}
NESTED = {"matryoshka_widths": [*PREFIXES, 512], "use_matryoshka_aux_loss": True}
RECIPES: dict[str, Callable[[Paired, World, int], Learnt]] = {
    "null": random_rows,
    "ours_default": ours(),
    "ours_topk": ours(**OURS),
    "ours_matryoshka": ours(**OURS, matryoshka=PREFIXES),
    "ours_batchtopk_matryoshka": ours(
        **OURS | {"k": 5, "activation": "batchtopk", "matryoshka": PREFIXES}
    ),
    "saelens_batchtopk": saelens("BatchTopK", 3e-4),
    "saelens_batchtopk_tuned": saelens("BatchTopK", **SAELENS),
    "saelens_matryoshka_tuned": saelens("MatryoshkaBatchTopK", **SAELENS, **NESTED),
}
"""`ours_default` has the settings of params.yaml but k, `saelens_batchtopk` the published ones (lr
3e-4, no decay); the others are tuned at this size, on seed 0."""


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", help=OUT_HELP.format(RESULT))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--seeds", nargs="+", type=whole(0), default=[0, 1, 2])
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="keep the activations there")
    arguments = parser.parse_args()
    path = measure(open_record(arguments.out, RESULT), arguments)
    print(f"written to {path}")


def measure(record: Record, arguments: argparse.Namespace) -> Path:
    """Train and score what `record` lacks, and write it after each dictionary."""
    try:
        import sae_lens
    except ImportError:
        sys.exit("the activations come from SAELens: pip install -e .[bench]")
    world = World()
    torch.set_num_threads(1)
    settings = {
        "world": asdict(world), "batch": BATCH, "steps": STEPS, "train_rows": ROWS * CLIPS,
        "test_rows": TEST_ROWS, "sae_lens": sae_lens.__version__, "torch": torch.__version__,
    }  # fmt: skip
    result = record.read()
    if any(result.get(key) != value for key, value in settings.items()):
        result = {**settings, "recipes": {}}
    with ExitStack() as stack:
        folder = arguments.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = synthetic_model(world)
        planted = planted_activations(model, world)
        result["active"] = float((planted.codes > 0).sum(1).double().mean())
        data = pair([training_store(model, world, folder)], TRAIN)
        for name in arguments.recipes:
            of = result["recipes"].setdefault(name, {})
            for seed in arguments.seeds:
                if str(seed) in of:
                    continue
                start = time.process_time()
                learnt = RECIPES[name](data, world, seed)
                seconds = time.process_time() - start
                of[str(seed)] = score(learnt, planted) | {"cpu_seconds": seconds}
                print(name, seed, of[str(seed)], file=sys.stderr)
                record.write(result)
    return record.write(result)


if __name__ == "__main__":
    run_program(main)
