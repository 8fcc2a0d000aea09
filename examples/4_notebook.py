# %% [markdown]
"""Look at one feature: a notebook of cells.

    python examples/4_notebook.py [--model nano-small] [--layer layers.1]

Open the file in VS Code, Spyder or (through jupytext) JupyterLab to run it cell by cell. As a
script it runs all cells in half a minute on one core.
"""

# %% Settings
from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from musicscope.core.command_line import Parser
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.formats import About, load_sae_folder, save_sae_lens
from musicscope.models.registry import load_model

parser = Parser(description=__doc__)
parser.add_argument("--model", default="nano-small", help="a folder or a name in data/models")
parser.add_argument("--layer", default="layers.1", help="hook point that is read")
args, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own

# %% Generate music and read a layer
model = load_model(args.model)
captions = ["A calm piece with guitar.", "A fast piece with drums and bass.", "A flute."] * 2
audio, codes = model.generate(captions, seconds=2.0, seed=0)
batch = model.with_captions(codes, [None] * len(captions))
x = model.capture(batch, [args.layer])[args.layer]  # [clip, frame, d]
print(f"{args.layer} of {model.name}: {tuple(x.shape)}")

# %% A dictionary: the SAE of `dvc repro train_sae`, or else principal components, both signs
folder = Path("data/sae") / model.name / "top1" / "seed-0"
learn, test = x[:3].flatten(0, 1), x[3:].flatten(0, 1)
if folder.is_dir():
    sae, _ = load_sae_folder(folder)
else:
    mean = learn.mean(0)
    _, _, directions = torch.linalg.svd(learn - mean, full_matrices=False)
    rows = torch.cat([directions, -directions])
    sae = TopKSAE(rows.clone(), torch.zeros(len(rows)), rows, mean, k=16)
values, indices = sae.encode(test)
error = (test - sae.reconstruct(test)).square().sum() / (test - test.mean(0)).square().sum()
print(f"{sae.n_latents} latents, explained variance {1 - float(error):.2f}")

# %% Where the most active feature fires
energy = torch.zeros(sae.n_latents).scatter_add_(0, indices.flatten(), values.flatten().square())
feature = int(energy.argmax())
curve = torch.where(indices == feature, values, 0).sum(1).view(3, -1)  # [clip, frame]
figure, axis = plt.subplots(figsize=(7, 2.5))
for caption, line in zip(captions[3:], curve, strict=True):
    axis.plot(torch.arange(len(line)) / model.frame_rate, line, label=caption)
axis.set(xlabel="seconds", ylabel=f"feature {feature}")
axis.legend()
print(f"feature {feature}: highest in {captions[3 + int(curve.amax(1).argmax())]!r}")

# %% Hand it to SAELens, and read it again
with tempfile.TemporaryDirectory() as place:
    save_sae_lens(sae, place, About(model.name, args.layer, frames=x.shape[1]))
    figure.savefig(Path(place) / "feature.png")
    again, about = load_sae_folder(place)
same = torch.allclose(again.reconstruct(test), sae.reconstruct(test), rtol=1e-5, atol=1e-5)
print(f"through the files of SAELens: {'equal' if same else 'DIFFERENT'}, {about.layer}")
