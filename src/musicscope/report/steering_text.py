"""Words of the report's section on steering, for models that draw music and those that edit it."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = {
    "sae": "features", "sae_words": "features and words", "diff_means": "difference of means",
    "diff_means_words": "difference of means and words", "probe_direction": "probe direction",
    "prompt_edit": "prompt edit", "random_feature": "random features",
    "random_direction": "random direction", "passthrough": "passthrough", "reseed": "other noise",
}  # fmt: skip
ORIGINAL = {"original": "the clip itself"}
"""Methods of audio models alone."""
INTRO = (
    "Music drawn twice with the same prompt and the same noise: as it is, and with features of one "
    "layer edited at every step. Success is the share of pieces on which a judge's verdict was the "
    "unwanted one and became the wanted one, mean over the judges that know the concept. Prompts "
    "name what is to go and keep clear of what is to come. Strengths were chosen on validation "
    "prompts, for every method within the same budget of quality; what stands here is of test "
    "prompts, in other words. Brackets are 95 % bootstraps over prompts.",
    "Controls: random features of like activity, a random direction of the same length, the "
    "autoencoder's own error with no edit (passthrough), and the same prompt with other noise. "
    "Where a method does not exceed these, it did nothing that chance does not do.",
)
CLIPS = (
    "{model} turns audio into audio and takes no prompts: recordings with the concept are to lose "
    "it, those without are to get it. Everything is measured from their plain reconstructions, so "
    "that what the codec loses cancels; the clip itself, not through the codec, is a control. "
    "Intervals resample groups of clips. There is no cross-entropy: what an edit costs is the "
    "spectral distance from the plain reconstruction."
)


@dataclass(frozen=True)
class Cost:
    """What stands for quality in a model's tables."""

    key: str
    of_features: str
    title: str
    note: str
    explained: str


CROSS_ENTROPY = Cost(
    "ce_cost", "quality cost of features", "rise of cross-entropy",
    "Quality cost: rise of the unsteered model's cross-entropy, nats a code.",
    "Cross-entropy: of the unsteered model on the tokens, nats a code, above that on the plain "
    "pieces.",
)  # fmt: skip
SPECTRAL = Cost(
    "spectral_cost", "spectral distance of features", "spectral distance",
    "Spectral distance: from the plain reconstruction; there is no cross-entropy.",
    "Spectral distance: multi-resolution, from the plain reconstruction.",
)  # fmt: skip
