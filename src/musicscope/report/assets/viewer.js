"use strict";
// Feature pages: lists come from index/<dictionary>.js, a feature from shards/<dictionary>-<n>.js.
// Scripts, since a file:// page may load no JSON. Text is only ever set as text, never as markup.
document.documentElement.classList.add("js");

const byId = (name) => document.getElementById(name);
const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const LEVEL = new Map([...ALPHABET].map((letter, i) => [letter, i]));
const SVG = "http://www.w3.org/2000/svg";
const PAGE = 200; // entries of the list that are added at once
const ANY = ""; // value of the choice of all dictionaries

const state = { manifest: null, index: new Map(), shards: new Map(), waiting: new Map(), found: [], shown: 0 };

const musicscope = {
  manifest(value) {
    state.manifest = value;
    start();
  },
  index(name, columns) {
    const rows = (columns.n || []).map((n, i) => ({
      name, n, rate: columns.rate[i], concept: columns.concept[i], auroc: columns.auroc[i],
      kl: columns.kl[i], match: columns.match[i],
    }));
    state.index.set(name, rows);
  },
  shard(name, number, records) {
    state.shards.set(`${name}-${number}`, records);
  },
};
window.musicscope = musicscope;

// Elements

function make(tag, options = {}, ...children) {
  const { className, text, ...attributes } = options;
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const short = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(3))).replace("-", "−"));
const percent = (share) => `${short(100 * share)} %`;

// Loading

function load(path) {
  if (!state.waiting.has(path)) {
    state.waiting.set(path, new Promise((done, failed) => {
      const script = make("script", { src: path });
      script.addEventListener("load", done);
      script.addEventListener("error", () => {
        state.waiting.delete(path);
        failed(new Error(`${path} is missing: run dvc repro feature_pages`));
      });
      document.head.append(script);
    }));
  }
  return state.waiting.get(path);
}

const dictionary = (name) => state.manifest.dictionaries.find((one) => one.name === name);
const loadIndex = (name) => load(`index/${name}.js`);

async function record(name, n) {
  await loadIndex(name);
  const place = state.index.get(name).findIndex((row) => row.n === n);
  if (place < 0) return null;
  const number = Math.floor(place / state.manifest.shard);
  await load(`shards/${name}-${number}.js`);
  return state.shards.get(`${name}-${number}`)[place % state.manifest.shard];
}

// The list

function wanted() {
  const words = byId("search").value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const chosen = byId("dictionary").value;
  const names = chosen === ANY ? state.manifest.dictionaries.map((one) => one.name) : [chosen];
  return { words, names };
}

function fits(row, title, words) {
  const text = `${title} ${row.name} ${row.concept.replaceAll("_", " ")} ${row.concept}`.toLowerCase();
  return words.every((word) => (/^\d+$/.test(word) ? String(row.n) === word : text.includes(word)));
}

async function search() {
  const { words, names } = wanted();
  await Promise.all(names.map(loadIndex));
  const key = byId("sort").value;
  const rows = [];
  for (const name of names) {
    const { title } = dictionary(name);
    for (const row of state.index.get(name)) if (fits(row, title, words)) rows.push(row);
  }
  // A feature without the number comes last; equal ones by dictionary and number.
  const value = (row) => (row[key] === null ? -Infinity : row[key]);
  if (key !== "n") rows.sort((a, b) => (value(b) === value(a) ? 0 : value(b) - value(a)));
  state.found = rows;
  state.shown = 0;
  byId("list").replaceChildren();
  const total = names.reduce((sum, name) => sum + dictionary(name).live, 0);
  byId("count").textContent = `${rows.length} of ${total} features`;
  more();
}

function more() {
  const several = byId("dictionary").value === ANY;
  const key = byId("sort").value;
  const part = state.found.slice(state.shown, state.shown + PAGE);
  byId("list").append(...part.map((row) => {
    const number = key === "n" || key === "rate" ? percent(row.rate) : short(row[key]);
    const link = make("a", { href: `#${row.name}/${row.n}` },
      make("span", { text: row.n }), make("span", { text: row.concept.replaceAll("_", " ") }),
      make("span", { className: "rate", text: number }));
    if (several) link.append(make("span", { className: "of", text: dictionary(row.name).title }));
    return make("li", {}, link);
  }));
  state.shown += part.length;
  byId("more").hidden = state.shown >= state.found.length;
  mark();
}

function mark() {
  for (const link of byId("list").querySelectorAll("a[aria-current]")) link.removeAttribute("aria-current");
  const here = [...byId("list").querySelectorAll("a")].find((link) => link.getAttribute("href") === location.hash);
  if (here) {
    here.setAttribute("aria-current", "true");
    here.scrollIntoView({ block: "nearest" });
  }
}

// One feature

function histogram([model, highest, counts], several) {
  const top = Math.log1p(Math.max(...counts, 1));
  const bars = counts.map((count, i) => {
    const height = (100 * Math.log1p(count)) / top;
    return draw("rect", { x: i + 0.05, y: 100 - height, width: 0.9, height });
  });
  const label = `${several ? `${model}: ` : ""}${counts.reduce((a, b) => a + b, 0)} active frames by activation`;
  const image = draw("svg", { viewBox: `0 0 ${counts.length} 100`, preserveAspectRatio: "none", class: "bars", role: "img", "aria-label": `${label}: ${counts.join(", ")}` }, ...bars);
  return make("div", {}, make("p", { className: "note", text: `${label} (heights: log)` }), image,
    make("div", { className: "axis" }, make("span", { text: "0" }), make("span", { text: short(highest) })));
}

function path(curve) {
  const points = [...curve].map((letter, i) => `${i} ${98 - (94 * LEVEL.get(letter)) / 63}`);
  return `M${points.join(" ")}`;
}

function excerpt(one, title, [, clip, first, values, curves], label) {
  const [id, caption, seconds] = state.manifest.clips[clip];
  const frames = curves[0].length;
  const [start, end] = [first / one.rate, (first + frames) / one.rate];
  const button = make("button", { type: "button", className: "play", "aria-label": `Play: ${label}, ${title}` });
  const image = make("img", { src: `clips/${clip}.png`, alt: "", loading: "lazy" });
  image.style.width = `${(100 * seconds) / (end - start)}%`;
  image.style.left = `${(-100 * start) / (end - start)}%`;
  image.style.right = "auto";
  const lines = draw("svg", { viewBox: `0 0 ${Math.max(1, frames - 1)} 100`, preserveAspectRatio: "none", "aria-hidden": "true" });
  curves.forEach((curve, i) => {
    const d = path(curve);
    lines.append(draw("path", { class: "halo", d }), draw("path", { class: `curve s${i % 4}`, d }));
  });
  const head = make("i", { className: "playhead" });
  const strip = make("div", { className: "strip" }, image, lines, head);
  const peaks = values.map((value, i) => (values.length > 1 ? `${short(value)} (${one.models[i]})` : short(value)));
  const item = make("li", { className: "moment" }, button, strip,
    make("p", {}, make("span", { className: "what", text: caption || id }), " ",
      make("span", { className: "where", text: `${id}, ${start.toFixed(2)} to ${end.toFixed(2)} s, highest in the clip ${peaks.join(", ")}` })));
  button.addEventListener("click", () => player.toggle({ button, head, clip, start, end }));
  return item;
}

function excerpts(one, title, heading, several) {
  if (!several.length) return null;
  const items = several.map((sample, i) => excerpt(one, title, sample, `${heading.toLowerCase()} ${i + 1}`));
  return make("section", {}, make("h3", { text: heading }), make("ul", { className: "moments" }, ...items));
}

function toward(names, values) {
  const top = Math.max(...values.map(Math.abs), 1e-12);
  const rows = names.map((name, i) => [name, values[i]]).sort((a, b) => b[1] - a[1]).flatMap(([name, value]) => {
    const bar = make("b", { className: value < 0 ? "down" : "" });
    const width = (50 * Math.abs(value)) / top;
    bar.style.width = `${width}%`;
    bar.style.left = value < 0 ? `${50 - width}%` : "50%";
    return [make("span", { text: name.replaceAll("_", " ") }), make("i", {}, bar), make("span", { text: short(value) })];
  });
  return make("div", { className: "toward" }, ...rows);
}

function effect(one, found) {
  if (!found) return null;
  const facts = found.text.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value })));
  const part = make("section", {}, make("h3", { text: "What it does at the output" }), make("dl", {}, ...facts));
  if (found.toward.length) {
    part.append(make("p", { className: "note", text: "Pull towards codes of clips with each concept, less clips without it: nats per code at its usual value, to first order. No null: compare with other features." }), toward(one.toward, found.toward));
  }
  return part;
}

function links(heading, entries) {
  if (!entries.length) return null;
  const items = entries.map(([text, name, n]) => {
    const there = dictionary(name);
    return make("li", {}, there ? make("a", { href: `#${name}/${n}`, text: `${n}` }) : String(n), ` ${text}`);
  });
  return make("section", {}, make("h3", { text: heading }), make("ul", { className: "plainlist" }, ...items));
}

function finder(rows) {
  if (!rows.length) return null;
  const heads = ["found for", "q", "AUROC", "on test", "held-out soundfont", "held-out source"];
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col", text })));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((text, i) => make(i ? "td" : "th", i ? { text } : { text, scope: "row" }))));
  return make("section", {}, make("h3", { text: "Concept finder" }), make("div", { className: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body))));
}

function steer(one, found) {
  const part = make("section", {}, make("h3", { text: "Steer this" }));
  if (found.steer) {
    part.append(make("code", { text: "musicscope studio" }),
      make("p", {}, make("a", { href: found.steer, target: "_blank", rel: "noopener", text: "Open the running studio on this feature" }),
        ` (page Concepts off and on, Single features: ${found.n}).`));
  } else if (one.kind === "sae") {
    part.append(make("p", { className: "note", text: "The studio steers features of another slot." }));
  } else {
    part.append(make("p", { className: "note", text: "Edits use a model's own SAE: see the matches." }));
  }
  return part;
}

function bands(one, title, samples) {
  const parts = [excerpts(one, title, "Top moments", samples.filter((sample) => sample[0] === 0))];
  const count = state.manifest.bands;
  const several = [];
  for (let band = count; band > 0; band -= 1) {
    const found = samples.filter((sample) => sample[0] === band);
    const [low, high] = [(100 * (band - 1)) / count, (100 * band) / count].map(Math.round);
    if (found.length) several.push(excerpts(one, title, `Random clips that reach ${low} to ${high} % of the highest value`, found));
  }
  return [...parts, ...several];
}

function steps(name, n) {
  const rows = state.found.some((row) => row.name === name && row.n === n) ? state.found : state.index.get(name);
  const at = rows.findIndex((row) => row.name === name && row.n === n);
  const button = (text, row, id) => {
    const made = make("button", { type: "button", text, id });
    if (row) made.addEventListener("click", () => { location.hash = `#${row.name}/${row.n}`; });
    else made.disabled = true;
    return made;
  };
  return make("div", { className: "steps" }, button("Previous", rows[at - 1], "previous"), button("Next", rows[at + 1], "next"));
}

async function show() {
  player.stop();
  const match = /^#([^/]+)\/(\d+)$/.exec(decodeURIComponent(location.hash));
  const main = byId("feature");
  if (!match || !dictionary(match[1])) {
    const first = state.found[0];
    if (first) location.replace(`#${first.name}/${first.n}`);
    else main.replaceChildren(make("p", { className: "note", text: "No feature matches." }));
    return;
  }
  const [name, n] = [match[1], Number(match[2])];
  const one = dictionary(name);
  const hash = location.hash;
  const found = await record(name, n);
  if (hash !== location.hash) return; // another was asked for meanwhile
  const title = `Feature ${n}`;
  document.title = `${title}, ${one.title}`;
  const headline = make("div", { className: "headline" }, make("h2", { text: title }), make("span", { className: "note", text: one.title }), steps(name, n));
  if (!found) {
    main.replaceChildren(headline, make("p", { className: "note", text: "It fires in none of the test clips, or does not exist." }));
    return;
  }
  const facts = [["concept", found.concept], ...found.facts].map(([key, value]) => make("div", {}, make("dt", { text: key }), make("dd", { text: value })));
  const several = found.streams.length > 1;
  const legend = several ? make("ul", { className: "legend" }, ...one.models.map((model, i) => make("li", {}, draw("svg", { viewBox: "0 0 24 8", "aria-hidden": "true" }, draw("path", { class: `curve s${i % 4}`, d: "M0 4H24" })), model))) : null;
  const near = links("Nearest features (decoder cosine)", found.near.map(([number, cosine]) => [`cosine ${short(cosine)}`, name, number]));
  const side = [near, links("Matches in other dictionaries", found.matches), steer(one, found)].filter(Boolean);
  main.replaceChildren(...[headline, make("dl", {}, ...facts),
    make("div", { className: "two" }, ...found.streams.map((stream) => histogram(stream, several))),
    legend, ...bands(one, title, found.samples), effect(one, found.effect), finder(found.finder),
    make("div", { className: "two" }, ...side)].filter(Boolean));
  main.scrollTop = 0;
  mark();
}

// Sound: one element plays excerpts of whole clips.

const player = {
  now: null,
  toggle(one) {
    const same = this.now && this.now.button === one.button;
    this.stop();
    if (same) return;
    const sound = byId("sound");
    this.now = one;
    one.button.classList.add("playing");
    one.head.style.visibility = "visible";
    const begin = () => {
      if (this.now !== one) return;
      sound.currentTime = one.start;
      sound.play().then(() => this.follow(one)).catch((reason) => this.fail(one, reason));
    };
    const source = `clips/${one.clip}.mp3`;
    if (sound.getAttribute("src") === source && sound.readyState > 0) begin();
    else {
      sound.addEventListener("loadedmetadata", begin, { once: true });
      sound.onerror = () => this.fail(one, null);
      sound.src = source;
      sound.load();
    }
  },
  follow(one) {
    if (this.now !== one) return;
    const time = byId("sound").currentTime;
    if (time >= one.end || byId("sound").ended) {
      this.stop();
      return;
    }
    one.head.style.left = `${(100 * (time - one.start)) / (one.end - one.start)}%`;
    requestAnimationFrame(() => this.follow(one));
  },
  stop() {
    byId("sound").pause();
    if (!this.now) return;
    this.now.button.classList.remove("playing");
    this.now.head.style.visibility = "hidden";
    this.now = null;
  },
  fail(one, reason) {
    if (reason && reason.name === "AbortError") return; // stopped before it began
    one.button.classList.add("failed");
    one.button.title = "this browser could not play the sound";
  },
};

// Start

async function start() {
  const choice = byId("dictionary");
  for (const one of state.manifest.dictionaries) choice.append(make("option", { value: one.name, text: `${one.title}: ${one.live}` }));
  choice.append(make("option", { value: ANY, text: "all" }));
  const asked = /^#([^/]+)\//.exec(decodeURIComponent(location.hash));
  if (asked && dictionary(asked[1])) choice.value = asked[1];
  const field = byId("search");
  field.form.addEventListener("submit", (event) => event.preventDefault());
  const again = () => search().catch(report);
  field.addEventListener("input", again);
  choice.addEventListener("change", again);
  byId("sort").addEventListener("change", again);
  byId("more").addEventListener("click", more);
  window.addEventListener("hashchange", () => show().catch(report));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest && event.target.closest("input, select, textarea");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target === field) {
      field.value = "";
      again();
    }
    if (typing) return;
    const step = { ArrowLeft: "previous", ArrowRight: "next" }[event.key];
    if (step && byId(step)) byId(step).click();
    if (event.key === "/") {
      event.preventDefault();
      field.focus();
      field.select();
    }
  });
  await search();
  await show();
}

function report(error) {
  byId("feature").replaceChildren(make("p", { className: "missing", text: error.message }));
}
