"""Label recordings with instrument families and other concepts, from captions or from tags.

Four answers, so that silence does not count as absence: `present`, `negated` (the text denies it),
`unlisted` (other instruments are named, this one is not) and `unknown`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from musicscope.config.concepts import ConceptDefinition
from musicscope.data.concepts import Concepts
from musicscope.data.taxonomy import FAMILIES

PRESENT, NEGATED, UNLISTED, UNKNOWN = "present", "negated", "unlisted", "unknown"

CAPTION_RULE = (
    "present: a word of the family outside negation; negated: only inside (no, without, instead "
    "of, lacks ... up to five words and lists with or/nor); unlisted, taken as absent: none, but "
    "other instruments are named and no band, orchestra or word that could mean the family; else "
    "unknown. Bass guitar is bass, not guitar; air guitar and guitar-like sounds are neither."
)
TAG_RULE = (
    "present: a tag whose words mean the family in captions (guitar: guitar, acousticguitar, "
    "classicalguitar, electricguitar; acousticbassguitar is bass); unlisted, taken as absent: "
    "none, at least min_tags instrument tags and no tag that could mean the family; else unknown."
)

CONCEPT_RULE = (
    "of params.concepts: present by a word of `tags` outside negation; negated: only inside; "
    "taken as absent: a word of `absent`, or silence as for families, without a word of `unclear`; "
    "else unknown. Among tags: a tag of `tags`; taken as absent with at least min_tags tags and "
    "none of `unclear`."
)

# Phrases whose words mean something else one by one; applied in this order to lower-case text.
PHRASES = tuple((re.compile(rf"\b(?:{a})", re.ASCII), b) for a, b in (
    (r"air[- ]guitar(?:s|ists?)?\b", "mime"),
    (r"[a-z]+-like\b|like an? (?:[a-z]+ )?guitars?\b", "similar"),
    (r"(guitar|drum|bass|piano|synth|string|organ)s?-?(?:less|free)\b", r"no \1"),
    (r"(acoustic|electric|lead|rhythm|clean|distorted)( ?(?:,|and|&|/) ?)bass guitars?\b",
     r"\1 guitar\2bass"),
    (r"bass guitar(?:s|ists?)?\b", "bass"),
    (r"(?:english horn|cor anglais)s?\b", "oboe"),
    (r"(?:mouth organ|(?:mouth|blues|jaw|jew'?s) harp)s?\b", "harmonica"),
    (r"(?:(?:electric|fender|e)[- ]pianos?|(?:fender )?rhodes|wurlitzer)(?: pianos?)?\b", "epiano"),
    (r"steel ?(?:drum|pan)s?\b", "steelpan"),
    (r"drum ?(?:and|&|n|'n'|'n|n') ?bass\b|d&b\b|dnb\b", "genre"),
    (r"bass[- ](?:drum|kick)(?:s)?\b", "drum"),
    (r"bass[- ](clarinet|trombone|flute|sax|saxophone)", r"\1"),
    (r"(?:synth|synthesi[sz]er) bass(?:line)?\b", "bass"),
    (r"bass[- ](?:heavy|boost(?:ed)?|frequenc(?:y|ies))\b", "lowend"),
    (r"bass[- ](?:voices?|vocals?|singers?)\b", "voice"),
    (r"(?:nylon|steel|six|twelve|seven|[0-9]+|guitar|muted|plucked|open)[- ]string(?:s|ed)?\b"
     r"(?= guitar)", ""),
    (r"(guitar|muted|plucked|open)[- ]strings\b", r"\1 plucking"),
    (r"(?:nylon|steel) strings?\b", "plucking"),
    (r"string(?:ed)?[- ]instruments?\b", "stringed"),
    (r"(?:tape|voice) recorders?\b", "device"),
))  # fmt: skip

MENTION = {
    "guitar": r"guitars?|guitarists?",
    "piano": r"pianos?|pianists?",
    "electric_piano": r"epiano",
    "mallets": r"marimbas?|vibraphones?|xylophones?|glockenspiels?|mallets?",
    "organ": r"organs?|organists?|hammonds?",
    "strings": r"strings|violins?|violinists?|violas?|cellos?|celli|cellists?|fiddles?|"
    r"string (?:sections?|quartets?|ensembles?|orchestras?)",
    "choir": r"choirs?|choral",
    "brass": r"brass|trumpets?|trumpeters?|trombones?|trombonists?|tubas?|horns?|cornets?|"
    r"flugelhorns?",
    "reed": r"saxophones?|saxophonists?|sax|saxes|oboes?|clarinets?|clarinetists?|bassoons?",
    "flute": r"flutes?|flautists?|flutists?|recorders?|piccolos?|pan ?pipes?",
    "synth": r"synths?|synthesi[sz]ers?",
    "plucked": r"harps?|harpists?|sitars?|banjos?|kotos?|mandolins?|ukuleles?|lutes?|ouds?|"
    r"zithers?|balalaikas?|bouzoukis?|shamisens?|guzhengs?|pipas?",
    "bass": r"bass|basses|bass ?lines?|bassists?|contrabass(?:es)?",
    "drums": r"drums?|drummers?|drumming|drum ?kits?|drum ?beats?|snares?|hi-?hats?|cymbals?|"
    r"kicks?(?! in\b| off\b)|toms",
}
# Words that could mean the family, or not: they keep it unknown.
UNCLEAR = {
    "guitar": r"stringed|plucking",
    "piano": r"keyboards?|keyboardists?|keys",
    "electric_piano": r"keyboards?|keyboardists?|keys",
    "mallets": r"bells?|chimes?|steelpan|kalimbas?|percussions?|percussive",
    "organ": r"keyboards?|keyboardists?|keys",
    "strings": r"stringed",
    "choir": r"vocals?|vocalists?|voices?|sing|sings|singing|singers?|chant\w*|chorus",
    "brass": r"wind instruments?|winds",
    "reed": r"woodwinds?|wind instruments?|winds",
    "flute": r"woodwinds?|wind instruments?|winds|whistles?",
    "synth": r"keyboards?|keyboardists?|keys|electronic\w*|pads?|arpeggiators?",
    "plucked": r"stringed|plucking|plucked|harpsichords?",
    "bass": r"808s?|sub-?bass|low ?end",
    "drums": r"percussions?|percussive|percussionists?|beats?|bongos?|congas?|tablas?|djembes?|"
    r"tambourines?|shakers?|claps?|claves?",
}
OTHER = r"accordions?|harmonicas?|harpsichords?|bagpipes?|steelpan|theremins?|keyboards?|bongos?|" \
    r"congas?|tablas?|djembes?|tambourines?|shakers?|percussions?|kalimbas?"  # fmt: skip
COLLECTIVE = r"orchestras?|orchestral|orchestration|symphon\w*|bands?|ensembles?|instruments|" \
    r"instrumentation"  # fmt: skip

_CUE = (
    r"no(?![-\w])|without|with no|instead of|rather than|lack of|lacks?|lacking|devoid of|free of|"
    r"absence of|minus|neither|nor|never|not? any|not accompanied by|"
    r"(?:is|are|was|were)(?:n't| not)|(?:does|do|did)(?:n't| not) (?:have|include|feature|"
    r"contain|use)"
)
_STOP = (
    r"but|with|while|whereas|although|though|just|only|plays?|playing|played|other than|except|"
    r"besides|apart from|beyond|and (?:an?|the|some)|has|have|features?"
)
_WORD = rf"(?!(?:{_STOP})\b)[\w'&/-]+"
_PHRASE = rf"{_WORD}(?:\s+{_WORD}){{0,4}}"
_NEGATION = re.compile(
    rf"\b(?:(?:instead of|rather than)\s+{_WORD}(?:\s+{_WORD}){{0,2}}"
    rf"|(?:{_CUE})\s+{_PHRASE}(?:(?:\s*,\s*{_PHRASE})*?\s*,?\s*\b(?:or|nor)\s+{_PHRASE})?)"
)
_ABSENT_AFTER = re.compile(
    r"\s+(?:is|are)\s+(?:absent|missing|not\s+(?:present|used|played|heard|included))\b"
)


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{pattern})\b")


_MENTION = {family: _words(MENTION[family]) for family in FAMILIES}
_UNCLEAR = {family: _words(UNCLEAR[family]) for family in FAMILIES}
_OTHER, _COLLECTIVE = _words(OTHER), _words(COLLECTIVE)


def _simplified(text: str) -> str:
    """Lower case, with the words of PHRASES replaced."""
    text = text.lower().replace("\u2019", "'")
    for pattern, replacement in PHRASES:
        text = pattern.sub(replacement, text)
    return text


@lru_cache
def _phrases(words: tuple[str, ...]) -> re.Pattern[str] | None:
    """Words of a definition as they are written in simplified captions; None without any."""
    parts = [re.escape(_simplified(w)).replace(r"\ ", r"[\s-]+") for w in words]
    return re.compile(rf"(?<![\w])(?:{'|'.join(parts)})(?:s|es)?(?![\w])") if parts else None


def from_caption(caption: str, concepts: Concepts | None = None) -> dict[str, str]:
    """Answer per family by CAPTION_RULE, from one caption in English, and by CONCEPT_RULE."""
    text = _simplified(caption)
    negated = [m.span() for m in _NEGATION.finditer(text)]

    def affirmed(match: re.Match[str]) -> bool:
        inside = any(start <= match.start() < end for start, end in negated)
        return not inside and not _ABSENT_AFTER.match(text, match.end())

    answers: dict[str, str] = {}
    for family, mention in _MENTION.items():
        found = [affirmed(m) for m in mention.finditer(text)]
        if found:
            answers[family] = PRESENT if any(found) else NEGATED
    named = PRESENT in answers.values() or any(affirmed(m) for m in _OTHER.finditer(text))
    closed = named and not _COLLECTIVE.search(text)
    for family in FAMILIES:
        if family not in answers:
            clear = closed and not _UNCLEAR[family].search(text)
            answers[family] = UNLISTED if clear else UNKNOWN

    def says(words: tuple[str, ...]) -> list[bool]:
        """Whether each of these words that the caption has is affirmed."""
        pattern = _phrases(words)
        return [affirmed(m) for m in pattern.finditer(text)] if pattern else []

    own = {}
    for name, concept in (concepts or {}).items():
        if found := says(concept.tags):
            own[name] = PRESENT if any(found) else NEGATED
        elif any(says(concept.absent)):
            own[name] = UNLISTED
        else:
            silent = concept.tags and closed and not says(concept.unclear)
            own[name] = UNLISTED if silent else UNKNOWN
    return answers | own


SPELLED = {
    "acousticbassguitar": "acoustic bass guitar", "acousticguitar": "acoustic guitar",
    "classicalguitar": "classical guitar", "doublebass": "double bass",
    "drummachine": "drum machine", "electricguitar": "electric guitar",
    "electricpiano": "electric piano", "pipeorgan": "pipe organ",
}  # fmt: skip
"""Tags of MTG-Jamendo that run words together; by these words, captions' rules hold for tags."""
ORCHESTRAL = frozenset({"strings", "brass", "reed", "flute", "plucked"})
TAGS_COULD_MEAN = {
    "piano": frozenset({"electric_piano"}), "orchestra": ORCHESTRAL,
    "computer": frozenset({"synth", "drums"}), "sampler": frozenset({"synth", "drums"}),
}  # fmt: skip
"""Families that a tag leaves unknown, beside those that UNCLEAR has words for."""
NO_TAG = frozenset({"mallets", "choir"})
"""Families that no tag means (`voice` may be one singer): without one they stay unknown."""


@lru_cache
def tag_families(tag: str) -> tuple[frozenset[str], frozenset[str]]:
    """Families that a tag means, and could mean, by the words of captions."""
    text = _simplified(SPELLED.get(tag, tag))
    means = frozenset(f for f in FAMILIES if _MENTION[f].search(text))
    could = frozenset(f for f in FAMILIES if _UNCLEAR[f].search(text))
    return means, (could | TAGS_COULD_MEAN.get(tag, frozenset())) - means


def is_known_tag(tag: str) -> bool:
    """Say whether a tag is of a family, could be, or is another instrument in captions."""
    return any(tag_families(tag)) or bool(_OTHER.fullmatch(tag))


def from_tags(
    tags: Collection[str], min_tags: int, concepts: Concepts | None = None,
    others: Collection[str] = (),
) -> dict[str, str]:  # fmt: skip
    """Answer per family by TAG_RULE, from MTG-Jamendo's instrument tags without their prefix.

    Per concept by CONCEPT_RULE, from these and from `others`, tags of genre and mood.
    """
    means = frozenset[str]().union(*(tag_families(tag)[0] for tag in tags))
    could = frozenset[str]().union(*(tag_families(tag)[1] for tag in tags))
    silent = UNLISTED if len(tags) >= min_tags else UNKNOWN
    return {
        family: PRESENT if family in means
        else UNKNOWN if family in could | NO_TAG
        else silent
        for family in FAMILIES
    } | {
        name: _tagged({*tags, *others}, concept, min_tags)
        for name, concept in (concepts or {}).items()
    }  # fmt: skip


def _tagged(tags: Collection[str], concept: ConceptDefinition, min_tags: int) -> str:
    """Answer for one concept by CONCEPT_RULE; tags of captions count with and without blanks."""

    def has(words: tuple[str, ...]) -> bool:
        return any({w.lower(), re.sub(r"[\s-]", "", w.lower())} & set(tags) for w in words)

    if has(concept.tags):
        return PRESENT
    if has(concept.unclear) or not concept.tags or len(tags) < min_tags:
        return UNKNOWN
    return UNLISTED


def combine(answers: Iterable[str]) -> bool | None:
    """Combine answers into one label: `present` wins over silence; with `negated` too, None."""
    given = set(answers)
    if {PRESENT, NEGATED} <= given or given <= {UNKNOWN}:
        return None
    return PRESENT in given


def merge_answers(sources: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Answer per family and concept from several captions, by `combine`."""
    answers = {None: UNKNOWN, True: PRESENT, False: UNLISTED}
    return {name: answers[label] for name, label in merge(sources).items()}


def merge(sources: Iterable[Mapping[str, str]]) -> dict[str, bool | None]:
    """Label per family and concept, by `combine` over captions and tags of one recording."""
    sources = list(sources)
    names = dict.fromkeys((*FAMILIES, *(name for s in sources for name in s)))
    return {name: combine(s.get(name, UNKNOWN) for s in sources) for name in names}


def agreement(pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Count recordings in which two sources of one family's label agree."""
    count: Counter[str] = Counter()
    for first, second in pairs:
        if UNKNOWN in (first, second):
            count["unknown_in_either"] += 1
            continue
        a, b = first == PRESENT, second == PRESENT
        count["agree" if a == b else "only_first" if a else "only_second"] += 1
    return {k: count[k] for k in ("agree", "only_first", "only_second", "unknown_in_either")}
