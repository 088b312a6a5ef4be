// Use the pack in the real front end as a person does, and print what was seen as JSON.
// node drive.mjs SERVER_URL CHROMIUM SCREENSHOT_FOLDER; tests/test_browser.py runs it and judges.

import { chromium } from "playwright-core";
import path from "node:path";

const [url, executablePath, folder] = process.argv.slice(2);
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

async function loadTemplate() {
  await page.evaluate(async (template) => {
    const answer = await fetch(`/api/workflow_templates/dream4d/${template}.json`);
    await window.app.loadGraphData(await answer.json(), true, true, template);
  }, TEMPLATE);
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
const picture = (n = 0) =>
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

async function waitForPicture(timeout = 240000, n = 0) {
  const end = Date.now() + timeout;
  while (Date.now() < end) {
    if ((await picture(n)).colours > 50) return true;
    await page.waitForTimeout(200);
  }
  return false;
}

/** Whether a viewer soon shows another picture, and it is one; a busy machine takes its time. */
async function changed(before, n = 0, colours = 20) {
  for (let i = 0; i < 100; i++) {
    const now = await picture(n);
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

/** Drag, use the keys, move the slider, switch the passes, play; say what changed the picture. */
async function tryViewer(name) {
  const found = {};
  const place = () => page.evaluate((type) => [...window.app.graph.nodes.find((n) => n.type === type).pos], VIEWER);
  const stood = await place();
  let before = await picture();
  await drag(0, 110, -10);
  found.drag = await changed(before, 0, 50);
  found.nodeStayed = String(await place()) === String(stood);
  before = await picture();
  await viewer(0, ".d4d-stage canvas").focus();
  await page.keyboard.press("ArrowLeft");
  found.keys = await changed(before, 0, 50);
  const slider = viewer(0, ".d4d-time input");
  found.moments = Number(await slider.getAttribute("max")) + 1;
  before = await picture();
  await slider.focus();
  for (let step = 0; step < 3; step++) await page.keyboard.press("ArrowRight");
  found.slider = await changed(before, 0, 50);
  for (const pass of ["depth", "normals", "rgb"]) {
    before = await picture();
    await viewer(0, `.d4d-passes button[data-pass="${pass}"]`).click();
    found[pass] = await changed(before);
    await page.waitForTimeout(100);
    await shot(`${name}-${pass}`);
  }
  const prints = new Set();
  await viewer(0, ".d4d-time button").click();
  for (let i = 0; i < 8; i++) {
    await page.waitForTimeout(170);
    prints.add((await picture()).print);
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
  found.pictures = (await waitForPicture(120000, 0)) && (await waitForPicture(120000, 1));
  found.finished = await soon(() => [...document.querySelectorAll(".d4d-bar")].every((bar) => bar.hidden), null, 60000);
  found.times = [await viewer(0, ".d4d-time").isVisible(), await viewer(1, ".d4d-time").isVisible()];
  await shot(name);
  const [one, two] = [await picture(0), await picture(1)];
  await drag(1, 110, 0);
  found.turned = [await changed(two, 1), (await picture(0)).print !== one.print];
  await page.evaluate((type) => {
    const [node] = window.app.graph.nodes.filter((node) => node.type === type);
    node.setSize([node.size[0] + 120, node.size[1] + 90]);
    window.app.canvas.setDirty(true, true);
  }, VIEWER);
  const wider = (width) => document.querySelector(".d4d-stage canvas").width > width;
  found.resized = (await soon(wider, one.width, 20000)) && (await picture(0)).colours > 20;

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
  found.partly = await waitForPicture(10000, 1);
  await page.evaluate((id) => window.app.graph.remove(window.app.graph.getNodeById(id)), cancelled);
  await soon(() => document.querySelectorAll(".d4d-view").length === 1, null, 20000);
  found.left = await page.locator(".d4d-view").count();
  const last = await picture(0);
  await drag(0, -110, 0);
  found.otherWorks = await changed(last, 0);
  return found;
}

try {
  await newPage();
  await open();
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
  seen.firstPicture = await waitForPicture();
  seen.early = await viewer(0, ".d4d-bar").isVisible();
  await shot("first-picture");
  seen.whole = await soon(() => document.querySelector(".d4d-bar")?.hidden, null, 240000);
  // nothing is clicked any more: what stays has to be kept by itself
  await page.waitForTimeout(1500);
  await open();
  await lookAt(VIEWER);
  seen.afterReload = await waitForPicture(20000);
  await shot("after-reload");
  seen.classic = seen.afterReload ? await tryViewer("classic") : null;

  await page.evaluate(() => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", true));
  await page.waitForTimeout(1500);
  await newPage();
  await open();
  await lookAt(VIEWER);
  seen.vueNodes = (await page.locator("[data-node-id]").count()) > 0;
  seen.inNewTab = await waitForPicture(20000);
  await shot("vue");
  seen.vue = seen.inNewTab ? await tryViewer("vue") : null;

  await loadTemplate();
  await lookAt(VIEWER);
  seen.freshHint = await viewer(0, ".d4d-hint").textContent();
  await shot("fresh");
  seen.severalVue = await trySeveral("several-vue");
  await page.evaluate(() => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", false));
  await page.waitForTimeout(1000);
  seen.severalClassic = await trySeveral("several-classic");
} catch (error) {
  seen.failed = String(error.stack ?? error);
  await shot("failed").catch(() => {});
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
