// The viewer of the node Preview 4D: shows the grid of images that nodes/preview4d.py renders.
// Drag to turn, slider and play for time, buttons for the passes. It draws sheets from ComfyUI's temporary folder;
// what it shows is kept in the node's properties, which are saved with the workflow and outlive a reload of the page.
// From where it is looked at is kept beside, for the tab: looking is no change of the workflow that Ctrl+Z would undo.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "Dream4DPreview4D";
const EVENT = "dream4d.view";
const RESULT = "dream4d_view";
const PROPERTY = "dream4d_view";
const SECONDS = 2.0; // once through the animation
const LABELS = { rgb: "RGB", depth: "Depth", normals: "Normals" };
const MOST = { views: 64, times: 64, heights: 7, size: 512 }; // what the node's widgets allow
const WIDEST = 4096; // of the canvas, pixels: a node of any size can be in a workflow file
const DEGREES_PER_TURN = 0.6; // of a drag, for each pixel
const OWN_KEYS = new Set([" ", "Enter", "Home", "End", "PageUp", "PageDown"].concat(
  ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"],
));

const STYLE = `
.d4d-view { position: relative; display: flex; flex-direction: column; width: 100%; height: 100%; min-height: 220px;
  box-sizing: border-box; overflow: hidden; border-radius: 8px; background: #17181c; color: #d8dae0;
  font: 12px/1.2 system-ui, sans-serif; user-select: none; }
.d4d-stage { position: relative; flex: 1 1 0; min-height: 0; }
.d4d-stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; cursor: grab; touch-action: none;
  outline: none; }
.d4d-stage canvas:active { cursor: grabbing; }
.d4d-stage canvas:focus-visible { box-shadow: inset 0 0 0 2px #6ea8fe; border-radius: 8px 8px 0 0; }
.d4d-hint { position: absolute; inset: 0; display: grid; place-items: center; padding: 16px; text-align: center;
  color: #9a9da6; pointer-events: none; }
.d4d-passes { position: absolute; top: 6px; right: 6px; display: flex; border-radius: 6px; overflow: hidden;
  background: #0009; }
.d4d-view button { border: 0; margin: 0; padding: 4px 8px; background: none; color: inherit; font: inherit;
  cursor: pointer; }
.d4d-view button:hover { background: #fff2; }
.d4d-view button:focus-visible, .d4d-view input:focus-visible { outline: 2px solid #6ea8fe; outline-offset: -2px; }
.d4d-passes button[aria-pressed="true"] { background: #3b82f6; color: #fff; }
.d4d-angle { position: absolute; top: 6px; left: 6px; padding: 4px 8px; border-radius: 6px; background: #0009;
  pointer-events: none; font-variant-numeric: tabular-nums; }
.d4d-time { flex: none; display: flex; align-items: center; gap: 6px; padding: 4px 8px; background: #202228; }
.d4d-time button { width: 26px; height: 24px; padding: 0; border-radius: 5px; font-size: 13px; }
.d4d-time input { flex: 1 1 0; min-width: 0; margin: 0; accent-color: #3b82f6; cursor: pointer; }
.d4d-time output { width: 34px; text-align: right; font-variant-numeric: tabular-nums; }
.d4d-bar { flex: none; height: 3px; background: #2b2e36; }
.d4d-bar div { height: 100%; width: 0; background: #3b82f6; transition: width 0.2s; }
.d4d-view [hidden] { display: none !important; }
`;

function addStyle() {
  if (document.getElementById("d4d-style")) return;
  const style = document.createElement("style");
  style.id = "d4d-style";
  style.textContent = STYLE;
  document.head.append(style);
}

function make(tag, className, parent, attributes = {}) {
  const element = document.createElement(tag);
  element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent?.append(element);
  return element;
}

/** A list of 1 to `most` values that are all good. */
const isList = (values, most, good) =>
  Array.isArray(values) && values.length > 0 && values.length <= most && values.every(good);
const isWhole = (n, least, most) => Number.isInteger(n) && n >= least && n <= most;
const isBetween = (n, least, most) => Number.isFinite(n) && n >= least && n <= most;
const isName = (text) => typeof text === "string" && /^[\w-]{1,100}$/.test(text);

/** The description in a value from a workflow file or a message, without anything that we don't know, or null. */
function readView(value) {
  const { name, subfolder, type, size, azimuths, elevations, times, passes, ready } = value ?? {};
  const good =
    isName(name) &&
    isName(subfolder) &&
    type === "temp" &&
    isWhole(size, 1, MOST.size) &&
    isWhole(azimuths, 1, MOST.views) &&
    isList(elevations, MOST.heights, (e) => isBetween(e, -90, 90)) &&
    isList(times, MOST.times, (t) => isBetween(t, 0, 1)) &&
    isList(passes, Object.keys(LABELS).length, (pass) => Object.hasOwn(LABELS, pass)) &&
    isList(ready, times.length, (index) => isWhole(index, 0, times.length - 1));
  if (!good) return null;
  return { name, subfolder, type, size, azimuths, elevations, times, passes, ready, coarse: value.coarse === true };
}

export class SceneView {
  /** `onChange` is called when what should be remembered has changed. */
  constructor(onChange = () => {}) {
    addStyle();
    this.onChange = onChange;
    this.view = null;
    this.images = new Map();
    this.state = { pass: "rgb", azimuth: 0, elevation: 0, time: 0 };
    this.playing = null;
    this.busy = false;
    this.build();
    this.observer = new ResizeObserver(() => this.draw());
    this.refresh();
  }

  build() {
    this.element = make("div", "d4d-view");
    this.stage = make("div", "d4d-stage", this.element);
    this.canvas = make("canvas", "", this.stage, {
      tabindex: "0",
      role: "img",
      "aria-label": "The scene: drag or use the arrow keys to turn it, space to play",
    });
    this.hint = make("div", "d4d-hint", this.stage);
    this.angle = make("div", "d4d-angle", this.stage);
    this.passes = make("div", "d4d-passes", this.stage, { role: "group", "aria-label": "What is shown" });
    for (const [pass, label] of Object.entries(LABELS)) {
      const button = make("button", "", this.passes, { type: "button", "data-pass": pass });
      button.textContent = label;
      button.addEventListener("click", () => this.change({ pass }));
    }
    this.bar = make("div", "d4d-bar", this.element);
    make("div", "", this.bar);
    this.timeRow = make("div", "d4d-time", this.element);
    this.play = make("button", "", this.timeRow, { type: "button" });
    this.play.addEventListener("click", () => this.setPlaying(this.playing === null));
    this.slider = make("input", "", this.timeRow, { type: "range", min: "0", step: "1", "aria-label": "Time" });
    this.slider.addEventListener("input", () => {
      this.setPlaying(false);
      this.change({ time: Number(this.slider.value) });
    });
    this.clock = make("output", "", this.timeRow);
    this.listen();
  }

  listen() {
    // what happens in here is not for the canvas behind, which would move the node or open its menu
    for (const name of ["pointerdown", "pointermove", "pointerup", "mousedown", "dblclick", "contextmenu"]) {
      this.element.addEventListener(name, (event) => event.stopPropagation());
    }
    // the page's shortcuts go on working here, except on the keys that the buttons and the slider use
    this.element.addEventListener("keydown", (event) => {
      const shortcut = event.ctrlKey || event.metaKey || event.altKey;
      if (!shortcut && OWN_KEYS.has(event.key)) event.stopPropagation();
    });
    let from = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !this.view) return;
      this.canvas.setPointerCapture(event.pointerId);
      from = { x: event.clientX, y: event.clientY, azimuth: this.state.azimuth, elevation: this.state.elevation };
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!from) return;
      const turned = from.azimuth - (event.clientX - from.x) * DEGREES_PER_TURN;
      const raised = from.elevation + (event.clientY - from.y) * DEGREES_PER_TURN;
      this.change({ azimuth: turned, elevation: raised });
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (from = null));
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    if (!this.view || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = 360 / this.view.azimuths;
    const { azimuth } = this.state;
    const rows = this.view.elevations;
    const row = this.nearestRow();
    const keys = {
      ArrowLeft: () => this.change({ azimuth: azimuth - step }),
      ArrowRight: () => this.change({ azimuth: azimuth + step }),
      ArrowUp: () => this.change({ elevation: rows[Math.min(row + 1, rows.length - 1)] }),
      ArrowDown: () => this.change({ elevation: rows[Math.max(row - 1, 0)] }),
      " ": () => this.setPlaying(this.playing === null),
    };
    if (!keys[event.key]) return;
    keys[event.key]();
    event.preventDefault();
  }

  /** Show another description (null: none); the point of view stays. `busy`: more sheets are being made. */
  show(view, busy = false) {
    this.busy = busy;
    const old = this.view;
    this.view = view;
    if (view?.name !== old?.name) this.images.clear();
    for (const [key, image] of this.images) {
      if (image.complete && !image.naturalWidth) this.images.delete(key); // it may be there by now
    }
    if (this.view) this.change({});
    this.refresh();
    this.fetchAll();
  }

  /** The run has ended, perhaps before all sheets were made. */
  settle() {
    this.busy = false;
    this.refresh();
  }

  change(changes) {
    Object.assign(this.state, changes);
    const { view, state } = this;
    if (view) {
      state.azimuth = ((state.azimuth % 360) + 360) % 360;
      state.elevation = Math.min(Math.max(state.elevation, view.elevations[0]), view.elevations.at(-1));
      state.time = Math.min(Math.max(state.time, 0), view.times.length - 1);
      if (!view.passes.includes(state.pass)) state.pass = view.passes[0];
    }
    if ("pass" in changes) this.fetchAll();
    this.refresh();
    this.onChange();
  }

  setPlaying(on) {
    if (on === (this.playing !== null)) return;
    if (!on) {
      clearInterval(this.playing);
      this.playing = null;
      this.refresh();
      this.onChange();
      return;
    }
    const moments = this.view?.times.length ?? 1;
    if (moments < 2) return;
    this.playing = setInterval(() => {
      if (!this.element.isConnected) return;
      this.state.time = (this.state.time + 1) % (this.view?.times.length ?? 1);
      this.refresh();
    }, (SECONDS * 1000) / moments);
    this.refresh();
  }

  nearestRow() {
    const distance = this.view.elevations.map((e) => Math.abs(e - this.state.elevation));
    return distance.indexOf(Math.min(...distance));
  }

  /** The number of the moment that is shown: the nearest one whose sheet is there. */
  nearestMoment() {
    const away = (index) => Math.abs(index - this.state.time);
    return this.view.ready.reduce((best, index) => (away(index) < away(best) ? index : best));
  }

  url(pass, index) {
    const { name, subfolder, type } = this.view;
    const query = new URLSearchParams({ filename: `${name}-${pass}-${index}.jpg`, subfolder, type });
    return api.apiURL(`/view?${query}`);
  }

  image(pass, index) {
    const key = `${pass}-${index}`;
    let image = this.images.get(key);
    if (!image) {
      image = new Image();
      image.onload = () => this.refresh();
      image.onerror = () => this.refresh();
      image.src = this.url(pass, index);
      this.images.set(key, image);
    }
    return image;
  }

  fetchAll() {
    for (const index of this.view?.ready ?? []) this.image(this.state.pass, index);
  }

  refresh() {
    const { view, state } = this;
    for (const button of this.passes.children) {
      button.setAttribute("aria-pressed", String(button.dataset.pass === state.pass));
    }
    this.passes.hidden = this.angle.hidden = !view;
    this.timeRow.hidden = !view || view.times.length < 2;
    this.slider.max = String((view?.times.length ?? 1) - 1);
    this.slider.value = String(state.time);
    this.clock.textContent = view ? view.times[Math.min(state.time, view.times.length - 1)].toFixed(2) : "";
    this.play.textContent = this.playing === null ? "▶" : "⏸";
    this.play.setAttribute("aria-label", this.playing === null ? "Play" : "Pause");
    const share = view ? (view.coarse ? 0.02 : view.ready.length / view.times.length) : 1;
    this.bar.hidden = !this.busy || share >= 1;
    this.bar.firstChild.style.width = `${100 * share}%`;
    this.draw();
  }

  draw() {
    const { canvas, view } = this;
    const image = view && this.image(this.state.pass, this.nearestMoment());
    const comes = Boolean(image) && !image.complete;
    this.element.setAttribute("aria-busy", String(comes || !this.bar.hidden));
    if (comes) {
      this.hint.hidden = true; // what it says is of the time before; the last image stays
      return;
    }
    const ratio = window.devicePixelRatio || 1;
    const pixels = (length) => Math.min(Math.max(1, Math.round(length * ratio)), WIDEST);
    const [width, height] = [pixels(this.stage.clientWidth), pixels(this.stage.clientHeight)];
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!view) return this.say("Run the workflow to see the scene.");
    if (!image.naturalWidth) return this.say("The images are gone: run the node again.");
    this.say("");
    const { size } = view;
    const column = Math.round((this.state.azimuth / 360) * view.azimuths) % view.azimuths;
    const row = this.nearestRow();
    this.angle.textContent = `${Math.round((column * 360) / view.azimuths)}°, ${Math.round(view.elevations[row])}° up`;
    const side = Math.min(width, height);
    const [left, top] = [(width - side) / 2, (height - side) / 2];
    const [x, y] = [column * size, row * size];
    context.imageSmoothingQuality = "high";
    // the image's own edge colours go on beside it, or above and below
    if (left > 0) context.drawImage(image, x, y, 2, size, 0, 0, width, height);
    if (top > 0) {
      context.drawImage(image, x, y, size, 2, 0, 0, width, top + 1);
      context.drawImage(image, x, y + size - 2, size, 2, 0, top + side - 1, width, top + 1);
    }
    context.drawImage(image, x, y, size, size, left, top, side, side);
  }

  say(text) {
    this.hint.textContent = text;
    this.hint.hidden = !text;
    if (text) this.angle.textContent = "";
  }

  /** Look from where a state, perhaps from a storage, says. */
  lookFrom(state) {
    const { pass, azimuth, elevation, time } = state ?? {};
    if (typeof pass === "string" && [azimuth, elevation, time].every(Number.isFinite)) {
      this.state = { pass, azimuth, elevation, time: Math.round(time) };
    }
  }

  /** It has a place on the page; it may lose it and get another one. */
  enter() {
    this.observer.observe(this.stage);
    alive.add(this);
  }

  leave() {
    this.setPlaying(false);
    this.observer.disconnect();
    alive.delete(this);
  }
}

// ---- where a node's view is remembered -------------------------------------------------------------------------

const views = new WeakMap(); // node -> SceneView
const alive = new Set(); // the SceneViews of nodes that are in a graph

function remember(node, view) {
  if (!view.view) return;
  node.properties ??= {};
  node.properties[PROPERTY] = view.view;
  try {
    sessionStorage.setItem(`${PROPERTY}:${node.id}:${view.view.name}`, JSON.stringify(view.state));
  } catch {
    // no room or not allowed: it is looked at from the front again
  }
}

function restore(node, view) {
  const kept = readView(node.properties?.[PROPERTY]);
  if (!kept) return view.show(null);
  try {
    view.lookFrom(JSON.parse(sessionStorage.getItem(`${PROPERTY}:${node.id}:${kept.name}`)));
  } catch {
    // nothing that can be read
  }
  view.show(kept);
}

/** Have the front end write its draft of the workflow, as it does by itself only after a click or a key. */
function keepDraft() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  if (tracker?.captureCanvasState) tracker.captureCanvasState();
  else tracker?.checkState?.();
}

/** The node that an execution id means: "7", or "3:7" for node 7 in the subgraph that node 3 stands for. */
function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(part) ?? graph?.getNodeById?.(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

function attach(node) {
  const view = new SceneView(() => remember(node, view));
  views.set(node, view);
  node.addDOMWidget("view", "dream4d_view", view.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => 240,
  });
  const [width, height] = node.size;
  node.setSize([Math.max(width, 300), Math.max(height, 440)]);
  const onAdded = node.onAdded;
  node.onAdded = function (...all) {
    view.enter();
    return onAdded?.apply(this, all);
  };
  const onRemoved = node.onRemoved;
  node.onRemoved = function (...all) {
    view.leave();
    return onRemoved?.apply(this, all);
  };
  const onExecuted = node.onExecuted;
  node.onExecuted = function (output, ...rest) {
    const found = readView(output?.[RESULT]?.[0]);
    if (found) {
      view.show(found);
      keepDraft();
    }
    return onExecuted?.call(this, output, ...rest);
  };
  const onConfigure = node.onConfigure;
  node.onConfigure = function (...all) {
    const result = onConfigure?.apply(this, all);
    restore(node, view);
    return result;
  };
}

app.registerExtension({
  name: "dream4d.preview4d",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      const found = readView(detail?.view);
      if (found) views.get(findNode(detail.node))?.show(found, true);
    });
    for (const name of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(name, () => {
        for (const view of alive) view.settle();
      });
    }
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) attach(node);
  },
});
