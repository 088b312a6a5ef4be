// Use the pack in the real front end as a person does, and print what was seen as JSON.
// node drive.mjs SERVER_URL CHROMIUM SCREENSHOT_FOLDER PART; tests/test_browser.py runs it and judges.

import { chromium } from "playwright-core";
import path from "node:path";

const [url, executablePath, folder, part] = process.argv.slice(2);
const TEMPLATE = "text_to_4d";
const NAMES = { static: "Dream4DOptimizeStaticScene", motion: "Dream4DAnimateScene", render: "Dream4DRender" };
const VIEWER = "Dream4DPreview4D";
const seen = { outside: [], errors: [], asked: 0 };

const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"].concat([
    "--disable-component-update",
    "--disable-sync",
  ]),
});
const context = await browser.newContext({ viewport: { width: 1700, height: 1050 } });
let page;

/** Open a tab; what another one kept for itself alone is not there. */
async function newPage() {
  await page?.close();
  page = await context.newPage();
  page.on("pageerror", (error) => seen.errors.push(error.message));
  // The front end itself asks the outside for this and that; what counts is what our script makes the page ask for.
  const devtools = await context.newCDPSession(page);
  await devtools.send("Network.enable");
  devtools.on("Network.requestWillBeSent", ({ request, initiator }) => {
    if (!JSON.stringify(initiator).includes("preview4d.js")) return;
    seen.asked += 1;
    if (/^(https?|wss?):/.test(request.url) && !request.url.startsWith(url)) seen.outside.push(request.url);
  });
}

const shot = (name) => page.screenshot({ path: path.join(folder, `${name}.png`) });
const soon = (test, argument, timeout) =>
  page.waitForFunction(test, argument, { timeout, polling: 100 }).then(() => true, () => false);

async function open() {
  await page.goto(url);
  await page.waitForFunction(() => window.app?.vueAppReady && window.app.graph?.nodes, null, { timeout: 90000 });
  await page.waitForTimeout(2000);
  await page.keyboard.press("Escape"); // the first visit opens the template browser
}

async function loadTemplate(name = TEMPLATE) {
  await page.evaluate(async (template) => {
    const answer = await fetch(`/api/workflow_templates/dream4d/${template}.json`);
    await window.app.loadGraphData(await answer.json(), true, true, template);
  }, name);
  await page.waitForTimeout(500);
}

const setWidgets = (type, values) =>
  page.evaluate(
    ([type, values]) => {
      const node = window.app.graph.nodes.find((node) => node.type === type);
      for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((widget) => widget.name === name);
        if (!widget) throw new Error(`${type} has no widget ${name}: ${node.widgets.map((w) => w.name)}`);
        widget.value = value;
      }
    },
    [type, values],
  );

const pressRun = () =>
  page.locator('[data-testid="queue-button"] button, button[data-testid="queue-button"]').first().click();

/** Move the canvas so that a node (of a type, the n-th) is seen whole. */
async function lookAt(type, n = 0) {
  await page.evaluate(
    ([type, n]) => {
      const { app } = window;
      const node = app.graph.nodes.filter((node) => node.type === type)[n];
      app.canvas.ds.scale = 1;
      app.canvas.ds.offset[0] = 500 - node.pos[0];
      app.canvas.ds.offset[1] = 200 - node.pos[1];
      app.canvas.setDirty(true, true);
    },
    [type, n],
  );
  await page.waitForTimeout(500);
}

/** The n-th viewer's part, as the page has it. */
const viewer = (n, selector = "") => page.locator(".d4d-view").nth(n).locator(selector || "xpath=.");

/** A fingerprint of what a viewer's canvas shows, how many different colours it has, and its width. */
const image = (n = 0) =>
  page.evaluate((n) => {
    const canvas = document.querySelectorAll(".d4d-stage canvas")[n];
    if (!canvas) return { print: "", colours: 0, width: 0 };
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let print = 0;
    const colours = new Set();
    for (let i = 0; i < data.length; i += 4) {
      const colour = (data[i] << 16) | (data[i + 1] << 8) | data[i + 2];
      print = (Math.imul(print, 31) + colour) | 0;
      if (data[i + 3]) colours.add(colour >> 2);
    }
    return { print: String(print), colours: colours.size, width: canvas.width };
  }, n);

/** The image of a viewer that waits for nothing: it is drawn, as large as its place, and stays. */
async function settled(n = 0) {
  const rest = (n) => {
    const view = document.querySelectorAll(".d4d-view")[n];
    const canvas = view?.querySelector("canvas");
    return view?.getAttribute("aria-busy") === "false" && canvas.width === canvas.clientWidth * devicePixelRatio;
  };
  let before = null;
  for (let i = 0; i < 100; i++) {
    if (!(await soon(rest, n, 120000))) break;
    const now = await image(n);
    if (now.print === before?.print) return now;
    before = now;
    await page.waitForTimeout(150);
  }
  throw new Error(`viewer ${n} does not come to rest`);
}

async function waitForImage(timeout = 240000, n = 0) {
  const end = Date.now() + timeout;
  while (Date.now() < end) {
    if ((await image(n)).colours > 50) return true;
    await page.waitForTimeout(200);
  }
  return false;
}

/** Whether a viewer soon shows another image, and it is one; a busy machine takes its time. */
async function changed(before, n = 0, colours = 20) {
  for (let i = 0; i < 100; i++) {
    const now = await image(n);
    if (now.print !== before.print && now.colours > colours) return true;
    await page.waitForTimeout(100);
  }
  return false;
}

async function drag(n, x, y) {
  const box = await viewer(n, ".d4d-stage canvas").boundingBox();
  const middle = [box.x + box.width / 2, box.y + box.height / 2];
  await page.mouse.move(...middle);
  await page.mouse.down();
  await page.mouse.move(middle[0] + x, middle[1] + y, { steps: 6 });
  await page.mouse.up();
}

/** Drag, use the keys, move the slider, switch the passes, play; say what changed the image. */
async function tryViewer(name) {
  const found = {};
  const place = () => page.evaluate((type) => [...window.app.graph.nodes.find((n) => n.type === type).pos], VIEWER);
  const stood = await place();
  let before = await settled();
  await drag(0, 110, -10);
  found.drag = await changed(before, 0, 50);
  found.nodeStayed = String(await place()) === String(stood);
  before = await settled();
  await viewer(0, ".d4d-stage canvas").focus();
  await page.keyboard.press("ArrowLeft");
  found.keys = await changed(before, 0, 50);
  const slider = viewer(0, ".d4d-time input");
  found.moments = Number(await slider.getAttribute("max")) + 1;
  before = await settled();
  await slider.focus();
  for (let step = 0; step < 3; step++) await page.keyboard.press("ArrowRight");
  found.slider = await changed(before, 0, 50);
  for (const pass of ["depth", "normals", "rgb"]) {
    before = await settled();
    await viewer(0, `.d4d-passes button[data-pass="${pass}"]`).click();
    found[pass] = await changed(before);
    await page.waitForTimeout(100);
    await shot(`${name}-${pass}`);
  }
  const prints = new Set();
  await viewer(0, ".d4d-time button").click();
  for (let i = 0; i < 8; i++) {
    await page.waitForTimeout(170);
    prints.add((await image()).print);
  }
  await viewer(0, ".d4d-time button").click();
  found.play = prints.size > 2;
  return found;
}

/** Three viewers on one canvas: a still scene, a moving one, and one whose run is cancelled. */
async function trySeveral(name) {
  const found = {};
  await page.evaluate((type) => {
    const { app } = window;
    const { LiteGraph } = window;
    app.graph.clear();
    ["red_cube", "jumping_cube"].forEach((name, n) => {
      const load = LiteGraph.createNode("Dream4DLoadScene");
      app.graph.add(load);
      load.pos = [0, 700 * n];
      load.widgets[0].value = `${name}.safetensors [example]`;
      const view = LiteGraph.createNode(type);
      app.graph.add(view);
      view.pos = [400 * n + 400, 0];
      const values = { views: 6, times: 3, heights: 2, size: 32 };
      for (const widget of view.widgets) widget.value = values[widget.name] ?? widget.value;
      load.connect(0, view, 0);
    });
  }, VIEWER);
  await lookAt(VIEWER);
  await pressRun();
  found.images = (await waitForImage(120000, 0)) && (await waitForImage(120000, 1));
  found.finished = await soon(() => [...document.querySelectorAll(".d4d-bar")].every((bar) => bar.hidden), null, 60000);
  found.times = [await viewer(0, ".d4d-time").isVisible(), await viewer(1, ".d4d-time").isVisible()];
  await shot(name);
  const [one, two] = [await settled(0), await settled(1)];
  await drag(1, 110, 0);
  found.turned = [await changed(two, 1), (await settled(0)).print !== one.print];
  await page.evaluate((type) => {
    const [node] = window.app.graph.nodes.filter((node) => node.type === type);
    node.setSize([node.size[0] + 120, node.size[1] + 90]);
    window.app.canvas.setDirty(true, true);
  }, VIEWER);
  const wider = (width) => document.querySelector(".d4d-stage canvas").width > width;
  found.resized = (await soon(wider, one.width, 20000)) && (await image(0)).colours > 20;

  const cancelled = await page.evaluate((type) => {
    const [, node] = window.app.graph.nodes.filter((node) => node.type === type);
    const values = { views: 32, times: 32, heights: 4, size: 64 };
    for (const widget of node.widgets) widget.value = values[widget.name] ?? widget.value;
    return node.id;
  }, VIEWER);
  await pressRun();
  const bar = () => !document.querySelectorAll(".d4d-bar")[1].hidden;
  found.progress = await soon(bar, null, 120000);
  await page.evaluate(() => fetch("/api/interrupt", { method: "POST" }));
  found.settled = await soon(() => document.querySelectorAll(".d4d-bar")[1].hidden, null, 120000);
  found.partly = await waitForImage(10000, 1);
  await page.evaluate((id) => window.app.graph.remove(window.app.graph.getNodeById(id)), cancelled);
  await soon(() => document.querySelectorAll(".d4d-view").length === 1, null, 20000);
  found.left = await page.locator(".d4d-view").count();
  const last = await settled(0);
  await drag(0, -110, 0);
  found.otherWorks = await changed(last, 0);
  return found;
}

/** A tab with classic or Vue nodes. */
async function openWith(vue) {
  await newPage();
  await open();
  await page.evaluate((vue) => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", vue), vue);
  await page.waitForTimeout(1500);
}

/** A template is run, looked at, reloaded, looked at in another tab with Vue nodes, and loaded afresh. */
async function story() {
  await openWith(false);
  await loadTemplate();
  await setWidgets(NAMES.static, { "recipe.steps": 24, preview_seconds: 0.5 });
  await setWidgets(NAMES.motion, { "recipe.steps": 12, preview_seconds: 0.5 });
  await setWidgets(NAMES.render, { frames: 2, width: 32, height: 32 });
  await setWidgets(VIEWER, { views: 8, heights: 1, size: 64 });
  await lookAt(NAMES.static);
  await shot("loaded");
  await pressRun();
  const training = await page.evaluate(
    (type) => String(window.app.graph.nodes.find((node) => node.type === type).id),
    NAMES.static,
  );
  seen.livePreview = await soon((id) => id in (window.app.nodePreviewImages ?? {}), training, 240000);
  await page.waitForTimeout(700);
  await shot("live-preview");
  await lookAt(VIEWER);
  seen.firstImage = await waitForImage();
  seen.early = await viewer(0, ".d4d-bar").isVisible();
  await shot("first-image");
  seen.whole = await soon(() => document.querySelector(".d4d-bar")?.hidden, null, 240000);
  // nothing is clicked any more: what stays has to be kept by itself
  await page.waitForTimeout(1500);
  await open();
  await lookAt(VIEWER);
  seen.afterReload = await waitForImage(20000);
  await shot("after-reload");
  seen.classic = seen.afterReload ? await tryViewer("classic") : null;

  await page.evaluate(() => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", true));
  await page.waitForTimeout(1500);
  await newPage();
  await open();
  await lookAt(VIEWER);
  seen.vueNodes = (await page.locator("[data-node-id]").count()) > 0;
  seen.inNewTab = await waitForImage(20000);
  await shot("vue");
  seen.vue = seen.inNewTab ? await tryViewer("vue") : null;

  await loadTemplate();
  await lookAt(VIEWER);
  seen.freshHint = await viewer(0, ".d4d-hint").textContent();
  await shot("fresh");
}

async function several() {
  for (const vue of [true, false]) {
    await openWith(vue);
    const name = vue ? "Vue" : "Classic";
    seen[`several${name}`] = await trySeveral(`several-${name.toLowerCase()}`);
  }
}

/** Each node's place with its head, [x, y, width, height] in units of the canvas; its boundingRect lags behind. */
const boxes = () =>
  page.evaluate(() => {
    const head = window.LiteGraph.NODE_TITLE_HEIGHT;
    return window.app.graph.nodes.map(({ id, type, pos, size }) => {
      return { id, type, box: [pos[0], pos[1] - head, size[0], size[1] + head] };
    });
  });

/** Move the canvas so that all nodes are seen, with room for what they will show. */
async function lookAtAll() {
  const places = (await boxes()).map(({ box }) => box);
  const [left, top] = [0, 1].map((axis) => Math.min(...places.map((box) => box[axis])));
  const [right, bottom] = [0, 1].map((axis) => Math.max(...places.map((box) => box[axis] + box[axis + 2])));
  await page.evaluate(
    ([left, top, width, height]) => {
      const { canvas } = window.app;
      canvas.ds.scale = Math.min(1550 / width, 850 / height);
      canvas.ds.offset[0] = 100 / canvas.ds.scale - left;
      canvas.ds.offset[1] = 130 / canvas.ds.scale - top;
      canvas.setDirty(true, true);
    },
    [left, top, right - left, bottom - top],
  );
  await page.waitForTimeout(500);
}

/** Where the nodes of the templates lie when loaded, and, in one of them, how high they become when it is run. */
async function templates() {
  const list = await fetch(`${url}/api/workflow_templates`);
  const names = (await list.json()).dream4d;
  for (const vue of [false, true]) {
    await openWith(vue);
    const found = { loaded: {} };
    for (const name of names) {
      await loadTemplate(name);
      await lookAtAll();
      found.loaded[name] = await boxes();
    }
    await loadTemplate();
    await setWidgets(NAMES.static, { "recipe.steps": 8, preview_seconds: 0.1 });
    await setWidgets(NAMES.motion, { "recipe.steps": 8, preview_seconds: 0.1 });
    await setWidgets(NAMES.render, { frames: 2, width: 32, height: 32 });
    await setWidgets(VIEWER, { views: 4, times: 2, heights: 1, size: 32 });
    await lookAtAll();
    // what has been seen so far is cached: another seed shows all of it again
    for (const type of [NAMES.static, NAMES.motion]) await setWidgets(type, { seed: vue ? 2 : 1 });
    await page.evaluate(() => {
      window.heights = {};
      setInterval(() => {
        for (const { type, size } of window.app.graph.nodes) {
          window.heights[type] = Math.max(window.heights[type] ?? 0, size[1] + window.LiteGraph.NODE_TITLE_HEIGHT);
        }
      }, 100);
    });
    await pressRun();
    const whole = (type) => {
      const view = window.app.graph.nodes.find((node) => node.type === type).properties.dream4d_view;
      return view && !view.coarse && view.ready.length === view.times.length;
    };
    await soon(whole, VIEWER, 300000);
    await settled();
    const shown = () => window.app.graph.nodes.find((node) => node.type === "SaveVideo").size[1] > 300;
    found.video = await soon(shown, null, 120000);
    await page.waitForTimeout(1000);
    found.heights = await page.evaluate(() => window.heights);
    found.after = await boxes();
    await shot(`template-${vue ? "vue" : "classic"}`);
    seen[vue ? "vue" : "classic"] = found;
  }
}

/** A description that a viewer can show, and what a workflow file may hold in its place. */
const GOOD = {
  name: "0123456789abcdef0123",
  subfolder: "dream4d_view",
  type: "temp",
  size: 48,
  azimuths: 6,
  elevations: [5, 50],
  times: [0, 0.5, 1],
  passes: ["rgb", "depth", "normals"],
  ready: [0, 1, 2],
  coarse: false,
};
const many = (value) => Array.from({ length: 20000 }, (_, index) => value ?? index);
const DAMAGED = {
  "no times": { ...GOOD, times: [] },
  "text in times": { ...GOOD, times: ["a", "b", "c"] },
  "null in times": { ...GOOD, times: [null, null, null] },
  "many times": { ...GOOD, times: many(0.5), ready: many() },
  "many ready": { ...GOOD, ready: many(1) },
  "ready beyond the end": { ...GOOD, ready: [7] },
  "text in ready": { ...GOOD, ready: ["0", {}] },
  "fractions in ready": { ...GOOD, ready: [0.5] },
  "huge size": { ...GOOD, size: 1e9 },
  "huge numbers": { ...GOOD, size: 1e9, azimuths: 1e9 },
  "text for size": { ...GOOD, size: "96" },
  "no elevations": { ...GOOD, elevations: [] },
  "text in elevations": { ...GOOD, elevations: ["low", { high: 1 }] },
  "many elevations": { ...GOOD, elevations: many(5) },
  "passes of others": { ...GOOD, passes: ["constructor", "__proto__"] },
  "objects in passes": { ...GOOD, passes: [{}, []] },
  "a path for a name": { ...GOOD, name: "../../input/private" },
  "a number for a name": { ...GOOD, name: 7 },
  "another folder": { ...GOOD, type: "input", subfolder: ".." },
  "lists in lists": { ...GOOD, times: [[0], [[0.5]]], elevations: [[]] },
  "a text": "dream4d",
  "a list": [1, 2, 3],
  "a number": 1e300,
  "nothing": null,
  "true": true,
};

/** Workflows with damaged viewers: are all the other nodes there, and do the viewers work after a run? */
async function damaged() {
  for (const vue of [false, true]) {
    await openWith(vue);
    const start = seen.errors.length;
    const found = { kinds: Object.keys(DAMAGED), lost: {}, stray: [] };
    const makeFlow = (views, changes = {}) =>
      page.evaluate(
        async ([type, views, changes]) => {
          const { app } = window;
          const pair = (id) => [
            { id, type: "Dream4DLoadScene", pos: [0, id * 300], size: [300, 80], widgets_values: ["red_cube.safetensors [example]"] },
            { id: id + 1, type, pos: [400, id * 300], size: [340, 460], widgets_values: [6, 3, 2, 32] },
            { id: id + 2, type: "MarkdownNote", pos: [800, id * 300], size: [200, 90], widgets_values: ["stays"] },
          ];
          const nodes = views.flatMap((view, n) => {
            const [load, show, note] = pair(3 * n + 1);
            load.outputs = [{ name: "scene", type: "DREAM4D_SCENE", links: [n + 1] }];
            show.inputs = [{ name: "scene", type: "DREAM4D_SCENE", link: n + 1 }];
            show.properties = { dream4d_view: view };
            return [load, Object.assign(show, changes), note];
          });
          const links = views.map((_, n) => [n + 1, 3 * n + 1, 0, 3 * n + 2, 0, "DREAM4D_SCENE"]);
          const flow = { version: 0.4, last_node_id: nodes.length, last_link_id: links.length, nodes, links };
          await app.loadGraphData(JSON.parse(JSON.stringify({ ...flow, groups: [], extra: {} })));
          return app.graph.nodes.length - nodes.length;
        },
        [VIEWER, views, changes],
      );
    const asked = seen.asked;
    for (const [kind, view] of Object.entries(DAMAGED)) {
      const less = await makeFlow([view]).catch((error) => String(error));
      await lookAt(VIEWER);
      const hint = await viewer(0, ".d4d-hint").textContent({ timeout: 5000 }).catch(() => "no viewer");
      if (less !== 0 || !hint.includes("Run the workflow")) found.lost[kind] = [less, hint];
    }
    found.asked = seen.asked - asked;
    for (const [kind, changes] of Object.entries({
      "properties are a text": { properties: "text" },
      "properties are null": { properties: null },
      "a huge node": { size: [1e9, 1e9] },
      "a node of text": { size: ["wide", null] },
      "odd widgets": { widgets_values: ["x", null, -1e9, 1e400] },
      "no widgets": { widgets_values: null },
    })) {
      const less = await makeFlow([null], changes).catch((error) => String(error));
      await page.waitForTimeout(300);
      if (less !== 0) found.lost[kind] = less;
    }
    // all of them at once, and a run: every viewer comes back to life
    await makeFlow(Object.values(DAMAGED).slice(0, 3));
    await lookAt(VIEWER);
    await pressRun();
    found.works = await waitForImage(120000, 0);
    const before = await settled(0);
    await drag(0, 110, 0);
    found.turns = await changed(before, 0);
    found.messages = await page.evaluate(
      ([good, views]) => {
        const { api } = window.app;
        const id = window.app.graph.nodes.find((node) => node.type === "Dream4DPreview4D").id;
        const send = (detail) => api.dispatchEvent(new CustomEvent("dream4d.view", { detail }));
        for (const view of views) send({ node: id, view });
        for (const detail of [null, undefined, "text", 7, {}, { node: id }, { node: null, view: good }]) send(detail);
        for (const node of [999, "3:7", "1:2:3", [], {}, "__proto__", -1, ""]) send({ node, view: good });
        return true;
      },
      [GOOD, Object.values(DAMAGED)],
    );
    found.stays = (await settled(0)).colours > 20;
    found.copied = await tryLife();
    await shot(`damaged-${vue ? "vue" : "classic"}`);
    found.errors = seen.errors.splice(start);
    seen[vue ? "vue" : "classic"] = found;
  }
}

/** A viewer's node is copied, put into a subgraph and taken out of it, removed and added again. */
async function tryLife() {
  const found = {};
  const inDom = () => page.locator(".d4d-view").count();
  found.copies = await page.evaluate((type) => {
    const { app } = window;
    const [node] = app.graph.nodes.filter((node) => node.type === type);
    const copy = node.clone();
    app.graph.add(copy);
    copy.pos = [400, -700];
    return [node, copy].map((each) => each.properties.dream4d_view?.name);
  }, VIEWER);
  await page.waitForTimeout(1000);
  found.again = await page.evaluate(async (type) => {
    const { app } = window;
    const [node] = app.graph.nodes.filter((node) => node.type === type);
    app.graph.remove(node);
    await new Promise((done) => setTimeout(done, 500));
    app.graph.add(node);
    return app.graph.nodes.filter((each) => each.type === type).indexOf(node);
  }, VIEWER);
  await page.evaluate(
    ([type, n]) => {
      const node = window.app.graph.nodes.filter((node) => node.type === type)[n];
      node.pos = [400, 2000];
      node.setSize([node.size[0] + 120, node.size[1] + 90]);
    },
    [VIEWER, found.again],
  );
  await lookAt(VIEWER, found.again);
  const last = (await inDom()) - 1;
  found.grows = await soon(() => {
    const all = [...document.querySelectorAll(".d4d-stage canvas")];
    return all.every((canvas) => !canvas.clientWidth || canvas.width === canvas.clientWidth * devicePixelRatio);
  }, null, 20000);
  found.viewers = last + 1;
  found.subgraph = await page.evaluate(async (type) => {
    const { app } = window;
    const [node] = app.graph.nodes.filter((node) => node.type === type);
    const made = app.graph.convertToSubgraph(new Set([node]));
    await new Promise((done) => setTimeout(done, 500));
    const inner = made.subgraph.nodes.find((each) => each.type === type);
    const id = `${made.node.id}:${inner.id}`;
    const { name, ...rest } = inner.properties.dream4d_view;
    app.api.dispatchEvent(new CustomEvent("dream4d.view", { detail: { node: id, view: { name: "other", ...rest } } }));
    return [Boolean(name), inner.properties.dream4d_view.name];
  }, VIEWER);
  return found;
}

/** The template that exports an animated GLB is run, and ComfyUI's own 3D viewer plays the file. */
async function meshes() {
  await openWith(false); // the server remembers which nodes the tab before had
  await page.setViewportSize({ width: 1000, height: 900 }); // drawn in software, a pixel counts
  await loadTemplate("scene_to_animated_glb");
  await setWidgets("Dream4DExportAnimatedGLB", { times: 6, resolution: 32, faces: 2000, threshold: 7.9 });
  await lookAt("Preview3D");
  await pressRun();
  const play = page.getByLabel("Play/Pause").first();
  await play.waitFor({ timeout: 240000 });
  const box = await page.locator(".dom-widget canvas").first().boundingBox({ timeout: 120000 });
  const clip = { x: box.x, y: box.y + 70, width: box.width, height: box.height - 110 }; // without the controls
  const take = async (name) => page.screenshot({ path: path.join(folder, `${name}.png`), clip });
  await page.waitForTimeout(1500); // a first frame
  await take("still0");
  await page.waitForTimeout(700);
  await take("still1");
  await play.click();
  seen.playing = 8;
  for (let n = 0; n < seen.playing; n++) {
    await page.waitForTimeout(150);
    await take(`playing${n}`);
  }
  await shot("glb");
}

const PARTS = { story, several, templates, damaged, meshes };

try {
  await PARTS[part]();
} catch (error) {
  seen.failed = String(error.stack ?? error);
  await shot("failed").catch(() => {});
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
