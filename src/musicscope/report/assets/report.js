"use strict";
// Search, filter and sort over the feature cards; one sound at a time, with a playhead.
// Text is only ever read from the page, never put back as markup.
document.documentElement.classList.add("js");

const byId = (name) => document.getElementById(name);
const cards = [...document.querySelectorAll(".card")].map((element, place) => ({
  element, place, words: element.textContent.toLowerCase(),
}));

function show() {
  const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = byId("kind").value;
  let shown = 0;
  for (const { element, words } of cards) {
    const fits = (!kind || element.dataset.kinds.split(" ").includes(kind)) && wanted.every((w) => words.includes(w));
    element.hidden = !fits;
    shown += fits;
    if (!fits) element.querySelectorAll("audio").forEach((sound) => sound.pause());
  }
  byId("count").textContent = `${shown} of ${cards.length} features`;
}

function arrange() {
  const key = byId("sort").value;
  const sign = byId("order").value === "down" ? -1 : 1;
  const value = ({ element }) => (key in element.dataset ? Number(element.dataset[key]) : NaN);
  const sorted = [...cards].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    // A feature without the number comes last in either order.
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a.place - b.place;
    return sign * (x - y) || a.place - b.place;
  });
  document.querySelector(".cards").append(...sorted.map(({ element }) => element));
}

function unfold(element) {
  if (element.matches(".part")) element.querySelector("details").open = true;
  for (let fold = element.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
}

function reveal() {
  const target = location.hash && byId(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  unfold(target);
  if (!target.matches(".card")) {
    target.scrollIntoView();
    return;
  }
  if (target.hidden) {
    byId("search").value = "";
    byId("kind").value = "";
    show();
  }
  target.scrollIntoView();
  target.focus({ preventScroll: true });
}

if (cards.length) {
  const search = byId("search");
  search.form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", show);
  byId("kind").addEventListener("change", show);
  byId("sort").addEventListener("change", () => {
    byId("order").value = byId("sort").selectedOptions[0].dataset.down === "1" ? "down" : "up";
    arrange();
  });
  byId("order").addEventListener("change", arrange);
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest && event.target.closest("input, select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      unfold(search);
      search.focus();
      search.select();
    } else if (event.key === "Escape" && event.target === search) {
      search.value = "";
      show();
    }
  });
  show();
  arrange();
}
window.addEventListener("hashchange", reveal);
reveal();

let current = null;
for (const moment of document.querySelectorAll(".moment")) {
  const [sound, button] = [moment.querySelector("audio"), moment.querySelector(".play")];
  const [head, strip] = [moment.querySelector(".playhead"), moment.querySelector(".strip")];
  const name = button.getAttribute("aria-label");
  sound.controls = false;
  const follow = () => {
    if (sound.duration) head.style.left = `${(100 * sound.currentTime) / sound.duration}%`;
    if (!sound.paused) requestAnimationFrame(follow);
  };
  const failed = (reason) => {
    if (reason && reason.name === "AbortError") return; // paused before it began
    button.classList.add("failed");
    button.title = "this browser could not play the sound";
  };
  sound.addEventListener("play", () => {
    if (current && current !== sound) current.pause();
    current = sound;
    button.classList.add("playing");
    button.setAttribute("aria-label", name.replace(/^Play/, "Pause"));
    head.style.visibility = "visible";
    follow();
  });
  sound.addEventListener("pause", () => {
    button.classList.remove("playing");
    button.setAttribute("aria-label", name);
  });
  sound.addEventListener("ended", () => {
    head.style.visibility = "hidden";
  });
  sound.addEventListener("error", failed);
  const toggle = () => (sound.paused ? sound.play().catch(failed) : sound.pause());
  button.addEventListener("click", toggle);
  strip.addEventListener("click", (event) => {
    // The pointer may start anywhere; the keyboard has the button.
    const box = strip.getBoundingClientRect();
    const start = (event.clientX - box.left) / box.width;
    const seek = () => {
      sound.currentTime = start * sound.duration;
    };
    if (sound.duration) seek();
    else sound.addEventListener("loadedmetadata", seek, { once: true });
    if (sound.paused) sound.play().catch(failed);
  });
}
