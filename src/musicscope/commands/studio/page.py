"""The studio's page in Gradio; its logic is in `logic`.

All buttons that use the model share one queue, which runs one job at a time. Cancel sets the event
of the user's job, which generation checks before each step, and removes a waiting job.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from html import escape

import gradio as gr
from gradio.components import Component

from musicscope.commands.studio import logic
from musicscope.steering.edit import BRANCHES, TARGETS
from musicscope.steering.session import KINDS, TextInput, Tick, known_concepts

Fields = dict[str, Component]
Job = Callable[[Tick], list]
"""Gives a value for each output."""

SINGLE_FEATURES = 3
"""Rows for single features."""
MOST_STRENGTH = 4.0
LEAD = (
    "Both sounds are generated with one seed, so they differ by the edit alone. Strength 1 is the "
    "best strength on validation prompts."
)
CSS = """
.scores table, table.scores { border-collapse: collapse; width: 100%; }
.scores caption { text-align: left; font-weight: 600; padding: .3rem 0; }
.scores th, .scores td { text-align: right; padding: .25rem .5rem; }
.scores th:first-child { text-align: left; }
#found textarea { font-family: var(--font-mono); white-space: pre; overflow-x: auto; }
.scores tbody tr { border-top: 1px solid var(--border-color-primary); }
"""


def theme() -> gr.themes.Default:
    """Return Gradio's plain theme with system fonts, so that nothing is fetched."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


# --- jobs -------------------------------------------------------------------------------------

_jobs: dict[tuple[str | None, str], threading.Event] = {}
"""(session, button) -> event that is set when the job is cancelled."""


def _work(request: gr.Request, button: str, progress: gr.Progress, outputs: int, job: Job) -> list:
    """Run `job(tick)`; show errors of the user in full, others by name."""
    key, cancelled = (request.session_hash, button), threading.Event()
    _jobs[key] = cancelled
    progress(0.0, desc="opening the model")
    shown = [-1.0]

    def report(share: float) -> None:
        if share - shown[0] >= 0.02:  # each update redraws the page
            shown[0] = share
            progress(share, desc="working")

    try:
        return job(logic.ticking(report, cancelled.is_set))
    except logic.Cancelled:
        return [gr.skip()] * outputs
    except (ValueError, FileNotFoundError) as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        name = type(error).__name__
        raise gr.Error(
            f"This did not work ({name}); see the terminal", print_exception=False
        ) from None
    finally:
        if _jobs.get(key) is cancelled:
            del _jobs[key]


def _stopper(button: str) -> Callable[[gr.Request], None]:
    def stop(request: gr.Request) -> None:
        if (event := _jobs.get((request.session_hash, button))) is not None:
            event.set()
        gr.Info("Cancelled")

    return stop


def _leave(request: gr.Request) -> None:
    """Cancel the jobs of a closed tab."""
    for (session, _), event in list(_jobs.items()):
        if session == request.session_hash:
            event.set()


# --- parts of the page ------------------------------------------------------------------------


def _input_fields(name: str, guidance: float | None) -> Fields:
    """Make fields for prompt, seed, seconds, guidance and branch."""
    prompt = gr.Textbox(
        "A slow, sparse piece with guitar and strings.", label="Prompt", elem_id=f"{name}-prompt",
        max_lines=3,
    )  # fmt: skip
    with gr.Row():
        seed = gr.Number(7, label="Seed", precision=0, elem_id=f"{name}-seed")
        seconds = gr.Slider(
            0.5, logic.LONGEST, 5.0, step=0.5, label="Seconds", elem_id=f"{name}-seconds"
        )
    with gr.Accordion("Guidance", open=False):
        scale = gr.Slider(1.0, 20.0, guidance or 3.0, step=0.5, label="Scale of guidance")
        branch = gr.Dropdown(
            [("as chosen", ""), *((b, b) for b in BRANCHES)], value="", label="Edit which half"
        )
    return {"prompt": prompt, "seed": seed, "seconds": seconds, "guidance": scale, "branch": branch}


def _buttons(name: str, text: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        go = gr.Button(text, variant="primary", elem_id=f"{name}-go")
        stop = gr.Button("Cancel", elem_id=f"{name}-cancel")
    return go, stop


def _stage(name: str) -> list[Component]:
    """Make players and spectrograms of both sounds, and the scores."""
    sounds, pictures = [], []
    with gr.Row():
        for kind in KINDS:
            with gr.Column(min_width=260):
                sounds.append(gr.Audio(
                    label=kind.capitalize(), interactive=False, format="wav",
                    buttons=["download"], elem_id=f"{name}-{kind}",
                ))  # fmt: skip
                pictures.append(gr.Image(
                    label=f"{kind.capitalize()}, spectrogram", interactive=False, buttons=[],
                    elem_id=f"{name}-{kind}-picture",
                ))  # fmt: skip
    scores = gr.HTML(elem_id=f"{name}-scores", elem_classes="scores")
    return [*sounds, *pictures, scores]


def _shown(outcome: logic.Outcome) -> list:
    both = (outcome.plain, outcome.steered)
    return [*map(logic.int16, both), *map(logic.picture, both), logic.scores_html(outcome)]


def _input(fields: Fields, values: dict) -> TextInput:
    return logic.input_of(*(values[fields[k]] for k in ("prompt", "seconds", "seed", "guidance")))


def _steer_tab(
    models: Sequence[str], device: str, guidance: float | None, model: gr.Dropdown
) -> Component:
    """Make the tab; return the field of the first single feature."""
    concepts = logic.all_concepts(models)
    known = set(known_concepts(models[0]))
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            fields = _input_fields("steer", guidance)
            rows = []
            for i, concept in enumerate(concepts):
                with gr.Row(visible=concept in known, elem_id=f"concept-{i}") as row:
                    turn = gr.Radio(
                        ["off", "none", "on"], value="none", label=concept.replace("_", " "),
                        elem_id=f"wish-{i}", min_width=220,
                    )  # fmt: skip
                    strength = gr.Slider(
                        0.0, MOST_STRENGTH, 1.0, step=0.1, elem_id=f"strength-{i}",
                        label=f"{concept.replace('_', ' ')}: strength", min_width=130,
                    )  # fmt: skip
                rows.append((concept, row, turn, strength))
            if not concepts:
                gr.Markdown("No concepts: run `dvc repro steer`.")
            singles = []
            with gr.Accordion("Single features", open=False, elem_id="knobs"):
                for i in range(SINGLE_FEATURES):
                    with gr.Row():
                        singles.append((
                            gr.Number(None, label="Feature", precision=0, elem_id=f"feature-{i}"),
                            gr.Dropdown(list(TARGETS), value="set", label="Operation"),
                            gr.Slider(0.0, 8.0, 1.0, step=0.1, label="Value (1: its usual one)"),
                        ))  # fmt: skip
            go, cancel = _buttons("steer", "Generate")
        with gr.Column(scale=4, min_width=320):
            outputs = _stage("steer")

    def generate(values: dict, request: gr.Request, progress: gr.Progress = gr.Progress()):  # noqa: B008
        def job(tick: Tick) -> list:
            source = _input(fields, values)
            requests = {
                concept: (values[turn], values[strength])
                for concept, _, turn, strength in rows
                if values[turn] in ("off", "on") and concept in known_concepts(values[model])
            }
            edits = [logic.feature_of(*(values[part] for part in single)) for single in singles]
            layer, steering = logic.plan(
                values[model], requests, [edit for edit in edits if edit is not None],
                values[fields["branch"]] or None, device,
            )  # fmt: skip
            asked = {concept: direction for concept, (direction, _) in requests.items()}
            return _shown(
                logic.perform(values[model], source, layer, steering, asked, tick, device)
            )

        return _work(request, "steer", progress, len(outputs), job)

    inputs = {model, *fields.values(), *(part for single in singles for part in single)}
    inputs |= {part for _, _, turn, strength in rows for part in (turn, strength)}
    _connect(go, cancel, "steer", generate, inputs, outputs)

    def show(name: str) -> list:
        there = known_concepts(name)
        return [gr.update(visible=concept in there) for concept in concepts]

    if concepts:
        model.change(show, model, [row for _, row, _, _ in rows], api_visibility="private")
    return singles[0][0]


def _find_tab(device: str, guidance: float | None, model: gr.Dropdown) -> None:
    found = gr.State(None)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            gr.Markdown(
                "Upload recordings with a concept and without it (ten of each, any length and "
                "format libsndfile reads)."
            )
            with_ = gr.File(label="With it", file_count="multiple", elem_id="with", height=140)
            without = gr.File(
                label="Without it", file_count="multiple", elem_id="without", height=140
            )
            window = gr.Slider(0.5, 30.0, 10.0, step=0.5, label="Seconds per window")
            search, stop_search = _buttons("find", "Find features")
        with gr.Column(scale=4, min_width=320):
            report = gr.Textbox(label="Found", lines=12, max_lines=24, elem_id="found",
                              interactive=False)  # fmt: skip
    gr.Markdown("### Steer with these features")
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            fields = _input_fields("found", guidance)
            direction = gr.Radio(["off", "on"], value="off", label="Concept", elem_id="found-turn")
            n = gr.Slider(1, logic.AUDIBLE, 4, step=1, label="Features")
            strength = gr.Slider(0.0, MOST_STRENGTH, 1.0, step=0.1, label="Strength")
            go, cancel = _buttons("found", "Generate")
        with gr.Column(scale=4, min_width=320):
            outputs = _stage("found")

    def look(values: dict, request: gr.Request, progress: gr.Progress = gr.Progress()):  # noqa: B008
        def job(tick: Tick) -> list:
            made = logic.find(
                values[model], values[with_], values[without], tick, values[window], device
            )
            return [made, made.text]

        return _work(request, "find", progress, 2, job)

    def generate(values: dict, request: gr.Request, progress: gr.Progress = gr.Progress()):  # noqa: B008
        def job(tick: Tick) -> list:
            source, of = _input(fields, values), values[found]
            branch = values[fields["branch"]] or "conditional"
            layer, steering = logic.plan_found(
                of, values[direction], values[n], values[strength], branch, device
            )
            return _shown(logic.perform(of.model, source, layer, steering, {}, tick, device))

        return _work(request, "found", progress, len(outputs), job)

    _connect(search, stop_search, "find", look, {model, with_, without, window}, [found, report])
    _connect(go, cancel, "found", generate,
             {found, direction, n, strength, *fields.values()}, outputs)  # fmt: skip


def _connect(
    go: gr.Button, cancel: gr.Button, name: str, work: Callable, inputs: set, outputs: list
) -> None:
    """Connect both buttons of a job; all jobs wait in one queue."""
    job = go.click(
        work, inputs, outputs, concurrency_id="model", concurrency_limit=1,
        api_visibility="private",
    )  # fmt: skip
    # Two listeners: Gradio shows no message of one that takes a job off the queue.
    cancel.click(_stopper(name), None, None, concurrency_limit=None, api_visibility="private")
    cancel.click(None, None, None, cancels=[job], api_visibility="private")


def build(models: Sequence[str], device: str, guidance: float | None) -> gr.Blocks:
    """Build the page for these models; guidance as in `generate.usual_guidance`."""
    with gr.Blocks(
        title="musicscope studio", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown(f"# musicscope studio\n{LEAD}")
        model = gr.Dropdown(list(models), value=models[0], label="Model", elem_id="model")
        with gr.Tab("Concepts off and on", id="steer"):
            feature = _steer_tab(models, device, guidance, model)
        with gr.Tab("Find a concept", id="find"):
            _find_tab(device, guidance, model)

        def preset(request: gr.Request) -> list:
            return [
                gr.skip() if v is None else v for v in logic.asked(request.query_params, models)
            ]

        page.load(preset, None, [model, feature], api_visibility="private")
        page.unload(_leave)
    return page
