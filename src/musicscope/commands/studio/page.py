"""The studio's page in Gradio; its logic is in `logic`.

All buttons that use the model share one queue, which runs one job at a time. Cancel sets the event
of the user's job, which generation checks before each step, and removes a waiting job. A job
yields the unedited sound as soon as it is there. When a setting changes, the results on the page
are marked as of earlier settings.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from musicscope.commands.studio import logic
from musicscope.steering.edit import BRANCHES, TARGETS
from musicscope.steering.session import KINDS, Sound, TextInput, Tick, known_concepts

Fields = dict[str, Component]
Job = Callable[[Tick], Iterator[list]]
"""Yields a value for each output."""

SINGLE_FEATURES = 3
"""Rows for single features."""
LEAD = (
    "Both sounds are generated with one seed, so they differ by the edit alone. Sliders go from "
    "off over 0 to on; 1 is the best strength on validation prompts."
)
SPECTROGRAM = 110
"""Height of a picture in pixels; result and controls must fit on one screen."""
CSS = """
.stale:has(a[download])::before { content: "These results are of earlier settings."; display: block;
  font-weight: 600; padding: .3rem .5rem; border-left: .25rem solid var(--color-accent); }
.stale:has(a[download]) > * { opacity: .55; }
.concepts { max-height: 38vh; overflow-y: auto; }
.excerpts audio { height: 2rem; max-width: 11rem; vertical-align: middle; }
footer { display: none; }
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


def _work(
    request: gr.Request, button: str, progress: gr.Progress, outputs: int, job: Job
) -> Iterator[list]:
    """Run `job(tick)`; show errors of the user in full, others by name."""
    key, cancelled = (request.session_hash, button), threading.Event()
    begin = time.monotonic()
    _jobs[key] = cancelled
    progress(0.0, desc="opening the model")
    shown = [-1.0]

    def report(share: float) -> None:
        if share - shown[0] >= 0.02:  # each update redraws the page
            shown[0] = share
            progress(share, desc=logic.time_left(time.monotonic() - begin, share))

    try:
        yield from job(logic.ticking(report, cancelled.is_set))
    except logic.Cancelled:
        yield [gr.skip()] * outputs
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


def _input_fields(name: str) -> Fields:
    """Make fields for prompt, seed and seconds."""
    prompt = gr.Textbox(
        "A slow, sparse piece with guitar and strings.", label="Prompt", elem_id=f"{name}-prompt",
        max_lines=2, placeholder="Empty: music without a caption",
    )  # fmt: skip
    with gr.Row():
        seed = gr.Number(7, label="Seed", precision=0, elem_id=f"{name}-seed", min_width=80)
        seconds = gr.Slider(
            0.5, logic.LONGEST, 4.0, step=0.5, label="Seconds", elem_id=f"{name}-seconds",
            min_width=200,
        )  # fmt: skip
    return {"prompt": prompt, "seed": seed, "seconds": seconds}


def _guidance_fields(guidance: float | None) -> Fields:
    with gr.Accordion("Guidance", open=False):
        scale = gr.Slider(1.0, 20.0, guidance or 3.0, step=0.5, label="Scale of guidance")
        branch = gr.Dropdown(
            [("as chosen", ""), *((b, b) for b in BRANCHES)], value="", label="Edit which half"
        )
    return {"guidance": scale, "branch": branch}


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
                    elem_id=f"{name}-{kind}-picture", height=SPECTROGRAM,
                ))  # fmt: skip
    scores = gr.HTML(elem_id=f"{name}-scores", elem_classes="scores")
    return [*sounds, *pictures, scores]


def _shown(outcomes: Iterator[logic.Outcome]) -> Iterator[list]:
    """Yield the outputs of `_stage`: first none, then each as it comes.

    A sound is sent once, or its player would start anew.
    """
    yield [None] * 5
    sent: list[Sound | None] = [None, None]
    for outcome in outcomes:
        sounds = [outcome.plain, outcome.steered]
        new = [sound is not before for sound, before in zip(sounds, sent, strict=True)]
        sent = sounds
        yield [
            f(sound) if sound and fresh else gr.skip()
            for f in (logic.int16, logic.picture)
            for sound, fresh in zip(sounds, new, strict=True)
        ] + [logic.scores_html(outcome)]


def _input(fields: Fields, values: dict) -> TextInput:
    return logic.input_of(*(values[fields[k]] for k in ("prompt", "seconds", "seed", "guidance")))


def _steer_tab(
    models: Sequence[str], device: str, guidance: float | None, model: gr.Dropdown
) -> Component:
    """Make the tab; return the field of the first single feature."""
    concepts = logic.all_concepts(models)

    def slider(name: str, concept: str, texts: dict[str, str]) -> dict[str, Any]:
        """Settings of a concept's slider for a model."""
        low, high = logic.slider_range(known_concepts(name).get(concept, ()))
        return {"minimum": low, "maximum": high, "info": texts.get(concept) or None,
                "visible": concept in texts}  # fmt: skip

    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            fields = _input_fields("steer")
            texts, sliders = logic.standing(models[0]), {}
            with gr.Row(elem_classes="concepts"):
                for i, concept in enumerate(concepts):
                    sliders[concept] = gr.Slider(
                        **slider(models[0], concept, texts), value=0.0, step=0.1, min_width=200,
                        label=f"{concept.replace('_', ' ')}: off – on", elem_id=f"concept-{i}",
                    )  # fmt: skip
            if not concepts:
                gr.Markdown("No concepts: run `dvc repro steer`.")
            go, cancel = _buttons("steer", "Generate")
            fields |= _guidance_fields(guidance)
            singles = []
            with gr.Accordion("Single features", open=False, elem_id="knobs"):
                for i in range(SINGLE_FEATURES):
                    with gr.Row():
                        singles.append((
                            gr.Number(None, label="Feature", precision=0, elem_id=f"feature-{i}"),
                            gr.Dropdown(list(TARGETS), value="set", label="Operation"),
                            gr.Slider(0.0, 8.0, 1.0, step=0.1, label="Value (1: its usual one)"),
                        ))  # fmt: skip
        with gr.Column(scale=4, min_width=320, elem_id="steer-result"):
            outputs = _stage("steer")

    def requests_of(values: dict) -> dict[str, tuple[str, float]]:
        there = known_concepts(values[model])
        asked = {c: logic.request_of(values[part]) for c, part in sliders.items() if c in there}
        return {concept: request for concept, request in asked.items() if request is not None}

    def generate(values: dict, request: gr.Request, progress: gr.Progress = gr.Progress()):  # noqa: B008
        def job(tick: Tick) -> Iterator[list]:
            source = _input(fields, values)
            requests = requests_of(values)
            edits = [logic.feature_of(*(values[part] for part in single)) for single in singles]
            layer, steering = logic.plan(
                values[model], requests, [edit for edit in edits if edit is not None],
                values[fields["branch"]] or None, device,
            )  # fmt: skip
            asked = {concept: direction for concept, (direction, _) in requests.items()}
            yield from _shown(
                logic.perform(values[model], source, layer, steering, asked, tick, device)
            )

        yield from _work(request, "steer", progress, len(outputs), job)

    def name_what_is_off(values: dict) -> str:
        off = [c for c, (direction, _) in requests_of(values).items() if direction == "off"]
        return logic.with_named(values[fields["prompt"]], off)

    inputs = {model, *fields.values(), *(part for single in singles for part in single)}
    inputs |= set(sliders.values())
    _connect(go, cancel, "steer", generate, inputs, outputs, "steer-result", inputs)
    if sliders:
        gr.on(
            [part.input for part in sliders.values()], name_what_is_off,
            {model, fields["prompt"], *sliders.values()}, fields["prompt"], queue=False,
            show_progress="hidden", trigger_mode="always_last", api_visibility="private",
        )  # fmt: skip

    def show(name: str) -> list:
        texts = logic.standing(name)
        return [gr.update(value=0.0, **slider(name, concept, texts)) for concept in concepts]

    if concepts:
        model.change(show, model, list(sliders.values()), api_visibility="private")
    return singles[0][0]


def _find_tab(device: str, guidance: float | None, model: gr.Dropdown) -> None:
    found = gr.State(None)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            gr.Markdown(
                "Upload or record a sound: its features are found and steered. With recordings "
                "without the concept too, ten of each, they are tested."
            )
            with gr.Row():
                with_ = gr.File(label="With it", file_count="multiple", elem_id="with", height=90,
                                min_width=140)  # fmt: skip
                without = gr.File(label="Without it", file_count="multiple", elem_id="without",
                                  height=90, min_width=140)  # fmt: skip
            with gr.Accordion("Record it", open=False, elem_id="recorder"):
                recorded = gr.Audio(
                    sources=["microphone"], type="filepath", show_label=False, elem_id="recorded"
                )
            search, stop_search = _buttons("find", "Find and generate")
            fields = _input_fields("found")
            with gr.Row():
                turn = gr.Slider(
                    -logic.RANGE, logic.RANGE, -1.0, step=0.1, label="Concept: off – on",
                    elem_id="found-turn", min_width=150,
                )  # fmt: skip
                n = gr.Slider(1, logic.AUDIBLE, 4, step=1, label="Features", min_width=120)
            go, cancel = _buttons("found", "Generate with these features")
            fields |= _guidance_fields(guidance)
            window = gr.Slider(0.5, 30.0, 10.0, step=0.5, label="Seconds per window")
        with gr.Column(scale=4, min_width=320):
            with gr.Column(elem_id="found-result"):
                outputs = _stage("found")
            excerpts = gr.HTML(elem_id="found-excerpts")
            report = gr.Textbox(label="Found", lines=6, max_lines=24, elem_id="found",
                              interactive=False)  # fmt: skip

    def steered(of: logic.Found | None, values: dict, tick: Tick) -> Iterator[list]:
        source = _input(fields, values)
        branch = values[fields["branch"]] or BRANCHES[0]
        direction, strength = logic.request_of(values[turn]) or ("on", 0.0)
        layer, steering = logic.plan_found(of, direction, values[n], strength, branch, device)
        name = "" if of is None else of.concept.model
        yield from _shown(logic.perform(name, source, layer, steering, {}, tick, device))

    def look(values: dict, request: gr.Request, progress: gr.Progress = gr.Progress()):  # noqa: B008
        def job(tick: Tick) -> Iterator[list]:
            files = [*(values[with_] or ()), *([values[recorded]] if values[recorded] else ())]
            made = logic.find(
                values[model], files, values[without], lambda share: tick(share / 2),
                values[window], device,
            )  # fmt: skip
            own = [made, made.text, made.page]
            for shown in steered(made, values, lambda share: tick((1 + share) / 2)):
                yield [*own, *shown]
                own = [gr.skip()] * 3

        yield from _work(request, "find", progress, 3 + len(outputs), job)

    def generate(values: dict, request: gr.Request, progress: gr.Progress = gr.Progress()):  # noqa: B008
        def job(tick: Tick) -> Iterator[list]:
            yield from steered(values[found], values, tick)

        yield from _work(request, "found", progress, len(outputs), job)

    settings = {turn, n, *fields.values()}
    searched = {model, with_, without, recorded, window, *settings}
    own = [found, report, excerpts]
    _connect(search, stop_search, "find", look, searched, [*own, *outputs], "found-result",
             searched)  # fmt: skip
    _connect(go, cancel, "found", generate, {found, *settings}, outputs, "found-result", searched)


def _connect(
    go: gr.Button, cancel: gr.Button, name: str, work: Callable, inputs: set, outputs: list,
    result: str, settings: set,
) -> None:  # fmt: skip
    """Connect both buttons of a job; all jobs wait in one queue.

    What the element `result` holds is marked while `settings` are not those of the last job. After
    a job without results, it is of an earlier one.
    """
    parts = sorted(settings, key=lambda part: part._id)
    mark = f"document.getElementById('{result}').classList.toggle('stale',"
    changed = f"(...now) => {{ {mark} JSON.stringify(now) !== window['{result}']); }}"
    asked = f"(...now) => {{ window['{result}'] = JSON.stringify(now); {mark} false); }}"
    none = f"() => {{ window['{result}'] = ''; {mark} true); }}"
    go.click(None, parts, None, js=asked, api_visibility="private")
    job = go.click(
        work, inputs, outputs, concurrency_id="model", concurrency_limit=1,
        api_visibility="private",
    )  # fmt: skip
    job.failure(None, None, None, js=none, api_visibility="private")
    gr.on([part.change for part in parts], None, parts, None, js=changed, api_visibility="private")
    # Listeners apart: Gradio shows no message of one that takes a job off the queue.
    cancel.click(_stopper(name), None, None, concurrency_limit=None, api_visibility="private")
    cancel.click(None, None, None, js=none, api_visibility="private")
    cancel.click(None, None, None, cancels=[job], api_visibility="private")


def _warm(name: str, device: str) -> None:
    """Load the first model before it is asked for, unless one is loaded."""
    if not logic.open_session.cache_info().currsize:
        logic.open_session(name, device)


def build(models: Sequence[str], device: str, guidance: float | None) -> gr.Blocks:
    """Build the page for these models; guidance as in `generate.usual_guidance`."""
    with gr.Blocks(
        title="musicscope studio", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        with gr.Row(equal_height=True):
            gr.Markdown(f"## musicscope studio\n{LEAD}")
            model = gr.Dropdown(list(models), value=models[0], label="Model", elem_id="model")
        with gr.Tab("Concepts off and on", id="steer"):
            feature = _steer_tab(models, device, guidance, model)
        with gr.Tab("Find a concept", id="find"):
            _find_tab(device, guidance, model)
        page.load(
            lambda: _warm(models[0], device), None, None, concurrency_id="model",
            concurrency_limit=1, show_progress="hidden", api_visibility="private",
        )  # fmt: skip

        def preset(request: gr.Request) -> list:
            return [
                gr.skip() if v is None else v for v in logic.asked(request.query_params, models)
            ]

        page.load(preset, None, [model, feature], api_visibility="private")
        page.unload(_leave)
    return page
