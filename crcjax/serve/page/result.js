// The result of a case: slides with their maps, the tiles with the most attention, and the figures.

import { attempt, button, element, getJson, made, show } from "./server.js";
import { closeSignatures, showSignatures } from "./sign.js";
import { loadLibrary, SlideViewer } from "./viewer.js";

const GALLERY_TILES = 12;
const GALLERY_PX = 160;
const LEGENDS = {
  attention: "Dark: the least attention of this slide's tiles; light: the most. Attention is not evidence.",
  evidence: "Red: evidence for the class; blue: against it.",
  excluded: "Blue: background, or refused by quality control.",
};

// The map that the person chose last; null before any choice.
let chosenMap = null;

// The result that is shown: its slides, each with its viewer, maps and the gallery's place.
let shown = null;

export function closeResult() {
  for (const slide of shown?.slides ?? []) {
    slide.viewer?.close();
  }
  shown = null;
  closeSignatures();
  for (const id of ["stage", "facts", "gallery", "result-message", "result-title", "legend"]) {
    element(id).replaceChildren();
  }
}

export async function openResult(item) {
  closeResult();
  const result = await getJson(`/v1/predictions/${item.id}/result`);
  shown = { id: item.id, result, slides: result.slides.map((row, number) => ({ row, number, viewer: null, maps: [] })) };
  element("result-title").textContent = `Case ${result.case_id}: ${result.target}`;
  element("slide-choice").replaceChildren(...shown.slides.map((slide) => made("option", slideLabel(slide), { value: slide.number })));
  element("all-slides").checked = false;
  element("several").hidden = shown.slides.length < 2;
  showFacts(current());
  show("result-view");
  element("result-title").focus();
  await showSignatures(item.id, result);
  await showSlides();
}

const slideLabel = (slide) => `Slide ${slide.number + 1}`;
const current = () => shown.slides[Number(element("slide-choice").value)];
const visible = () => (element("all-slides").checked ? shown.slides : [current()]);
const path = (slide) => `/v1/predictions/${shown.id}/slides/${slide.row.id}`;

// Opens viewers for the slides that are to be seen, and closes the others.
async function showSlides() {
  for (const slide of shown.slides) {
    slide.viewer?.close();
    slide.viewer = null;
  }
  element("stage").replaceChildren();
  element("stage").classList.toggle("several", visible().length > 1);
  showFacts(current());
  for (const slide of visible()) {
    const figure = made("figure");
    figure.append(made("div", "", { className: "slide" }), made("figcaption", slideLabel(slide)));
    element("stage").append(figure);
    try {
      const [library, image] = [await loadLibrary(), await getJson(`/v1/slides/${slide.row.id}/image`)];
      slide.viewer = new SlideViewer(library, figure.firstChild, slide.row.id, image, slideLabel(slide));
    } catch (error) {
      element("result-message").textContent = error.message;
      showHeatmap(slide, figure);
    }
    slide.maps = slide.row.call || slide.row.probs.length ? await getJson(`${path(slide)}/maps`).catch(() => []) : [];
  }
  const hasViewer = visible().some((slide) => slide.viewer);
  element("controls").hidden = !hasViewer;
  if (hasViewer) {
    showChoices(current());
    await showMap();
  }
}

// Without the viewer, or for a slide that it cannot read: the picture that the worker made.
function showHeatmap(slide, figure) {
  figure.firstChild.remove();
  if (slide.row.probs.length) {
    figure.prepend(made("img", "", {
      src: `${path(slide)}/heatmap.png`,
      alt: `The slide beside its copy coloured by attention; predicted class ${slide.row.call || "none"}`,
    }));
  }
}

function showChoices(slide) {
  const none = made("option", "No map", { value: "" });
  element("map-choice").replaceChildren(none, ...slide.maps.map((map) => made("option", map.label, { value: map.id })));
  const predicted = shown.result.classes.indexOf(slide.row.call);
  const wanted = [chosenMap, `evidence.${predicted}`, `attention.${predicted}`, "attention", ""];
  element("map-choice").value = wanted.find((id) => id === "" || slide.maps.some((map) => map.id === id));
}

async function showMap() {
  const id = element("map-choice").value;
  for (const slide of visible().filter((candidate) => candidate.viewer)) {
    const map = slide.maps.find((candidate) => candidate.id === id);
    if (map) {
      const picture = new Image();
      picture.src = `${path(slide)}/maps/${id}.png`;
      await picture.decode();
      slide.viewer?.setMap(picture, map.box);
    } else {
      slide.viewer.setMap(null);
    }
  }
  const map = current()?.maps.find((candidate) => candidate.id === id);
  const scale = map?.scale ? ` The colours end at ${map.scale.toPrecision(2)} nats.` : "";
  element("legend").textContent = map ? LEGENDS[map.kind] + scale : "";
  element("legend").dataset.kind = map?.kind ?? "";
  setOpacity();
  await showGallery(map);
}

async function showGallery(map) {
  const slide = current();
  element("gallery").replaceChildren();
  if (!map || map.kind === "excluded" || !slide.viewer) {
    return;
  }
  slide.top = await getJson(`${path(slide)}/maps/${map.id}/top-tiles?count=${GALLERY_TILES}`);
  slide.place = -1;
  element("gallery").replaceChildren(...slide.top.map((tile, number) => {
    const square = `x=${Math.round(tile.x)}&y=${Math.round(tile.y)}&side=${Math.round(tile.side)}&px=${GALLERY_PX}`;
    const go = button("", `Tile ${number + 1} of the ${map.label.toLowerCase()}`, () => goTo(number));
    go.append(made("img", "", { src: `/v1/slides/${slide.row.id}/square.jpeg?${square}`, alt: "", width: 80, height: 80 }));
    go.append(made("span", String(number + 1)));
    const item = made("li");
    item.append(go);
    return item;
  }));
}

function goTo(number) {
  const slide = current();
  if (!slide?.viewer || !slide.top?.length) {
    return;
  }
  slide.place = (number + slide.top.length) % slide.top.length;
  slide.viewer.goTo(slide.top[slide.place]);
  [...element("gallery").querySelectorAll("button")].forEach((made, index) =>
    made.toggleAttribute("aria-current", index === slide.place));
}

function setOpacity() {
  const share = Number(element("opacity").value) / 100;
  for (const slide of shown.slides) {
    slide.viewer?.setOpacity(share);
  }
}

const digits = (value) => (value === null || value === undefined ? "not determined" : value.toFixed(3));

function showFacts(slide) {
  const { row } = slide;
  const { classes } = shown.result;
  const facts = [["Predicted class", row.call || `none: ${row.reason}`]];
  classes.forEach((name, index) => {
    if (row.probs.length) {
      facts.push([`Probability of ${name}`, digits(row.probs[index])]);
    }
  });
  facts.push(["Entropy", `${digits(row.entropy)} nats of at most ${digits(Math.log(classes.length))}`]);
  // Heads without evidence have none.
  if (row.vacuity !== null && row.vacuity !== undefined) {
    facts.push(["Vacuity", digits(row.vacuity)]);
  }
  if (row.conformal_set) {
    facts.push(["Conformal set", row.conformal_set.join(", ") || "empty"]);
  }
  facts.push(["Quality control", [row.qc_verdict, row.qc_reasons].filter(Boolean).join(": ")]);
  facts.push(["Synthetic slide", row.synthetic ? "yes" : "no"]);
  element("facts").replaceChildren(...facts.flatMap(([name, value]) => [made("dt", name), made("dd", value)]));
}

element("slide-choice").addEventListener("change", () => attempt(showSlides));
element("all-slides").addEventListener("change", () => attempt(showSlides));
element("map-choice").addEventListener("change", () => attempt(async () => {
  chosenMap = element("map-choice").value;
  await showMap();
}));
element("opacity").addEventListener("input", setOpacity);

const ACTIONS = {
  "zoom-in": () => current().viewer?.zoomBy(2),
  "zoom-out": () => current().viewer?.zoomBy(0.5),
  "whole-slide": () => current().viewer?.home(),
  "previous-tile": () => goTo((current().place ?? 0) - 1),
  "next-tile": () => goTo((current().place ?? -1) + 1),
};
for (const [id, action] of Object.entries(ACTIONS)) {
  element(id).addEventListener("click", action);
}

// Keys of one letter act only while the slide has the focus, so that they disturb no screen reader.
function changeOpacity(step) {
  element("opacity").value = Number(element("opacity").value) + step;
  setOpacity();
}
const KEYS = {
  "[": () => changeOpacity(-10),
  "]": () => changeOpacity(10),
  n: ACTIONS["next-tile"],
  p: ACTIONS["previous-tile"],
  m: () => attempt(async () => {
    const choice = element("map-choice");
    choice.selectedIndex = (choice.selectedIndex + 1) % choice.length;
    chosenMap = choice.value;
    await showMap();
  }),
};
element("stage").addEventListener("keydown", (event) => {
  if (KEYS[event.key] && !event.ctrlKey && !event.altKey && !event.metaKey) {
    event.preventDefault();
    KEYS[event.key]();
  }
});
