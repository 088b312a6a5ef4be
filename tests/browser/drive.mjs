// Use the pack in the real front end as a person does, and print what was seen as JSON.
// node drive.mjs SERVER_URL CHROMIUM SCREENSHOT_FOLDER; tests/test_browser.py runs it and judges.

import { chromium } from "playwright-core";
import path from "node:path";

const [url, executablePath, folder] = process.argv.slice(2);
const TEMPLATE = "text_to_4d";
const NAMES = { static: "Dream4DOptimizeStaticScene", motion: "Dream4DAnimateScene", render: "Dream4DRender" };
const VIEWER = "Dream4DPreview4D";
const seen = { outside: [], errors: [] };

const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"].concat([
    "--disable-component-update",
    "--disable-sync",
  ]),
});
const page = await browser.newPage({ viewport: { width: 1700, height: 1050 } });
page.on("pageerror", (error) => seen.errors.push(error.message));
// The front end itself asks the outside for this and that; what counts is what our script makes the page ask for.
const devtools = await page.context().newCDPSession(page);
await devtools.send("Network.enable");
devtools.on("Network.requestWillBeSent", ({ request, initiator }) => {
  const ours = JSON.stringify(initiator).includes("preview4d.js");
  if (ours && /^(https?|wss?):/.test(request.url) && !request.url.startsWith(url)) seen.outside.push(request.url);
  if (ours) seen.asked = (seen.asked ?? 0) + 1;
});

const shot = (name) => page.screenshot({ path: path.join(folder, `${name}.png`) });

async function open() {
  await page.goto(url);
  await page.waitForFunction(() => window.app?.vueAppReady && window.app.graph?.nodes, null, { timeout: 90000 });
  await page.waitForTimeout(2500);
  await page.keyboard.press("Escape"); // the first visit opens the template browser
}

/** Open the pack's template and make its runs short. */
async function loadTemplate() {
  await page.evaluate(
    async ([template, names, viewer]) => {
      const answer = await fetch(`/api/workflow_templates/dream4d/${template}.json`);
      const workflow = await answer.json();
      await window.app.loadGraphData(workflow, true, true, template);
      const set = (type, values) => {
        const node = window.app.graph.nodes.find((node) => node.type === type);
        for (const [name, value] of Object.entries(values)) {
          const widget = node.widgets.find((widget) => widget.name === name);
          if (!widget) throw new Error(`${type} has no widget ${name}: ${node.widgets.map((w) => w.name)}`);
          widget.value = value;
        }
      };
      set(names.static, { "recipe.steps": 60, preview_seconds: 0.5 });
      set(names.motion, { "recipe.steps": 30, preview_seconds: 0.5 });
      set(names.render, { frames: 2, width: 32, height: 32 });
      set(viewer, { size: 64 });
    },
    [TEMPLATE, NAMES, VIEWER],
  );
  await page.waitForTimeout(500);
}

/** Move the canvas so that a node is seen whole. */
async function lookAt(type) {
  await page.evaluate((type) => {
    const { app } = window;
    const node = app.graph.nodes.find((node) => node.type === type);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset[0] = 500 - node.pos[0];
    app.canvas.ds.offset[1] = 200 - node.pos[1];
    app.canvas.setDirty(true, true);
  }, type);
  await page.waitForTimeout(600);
}

/** A fingerprint of what the viewer's canvas shows, and how many different colours it has. */
const picture = () =>
  page.evaluate(() => {
    const canvas = document.querySelector(".d4d-stage canvas");
    if (!canvas) return { print: "", colours: 0 };
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let print = 0;
    const colours = new Set();
    for (let i = 0; i < data.length; i += 4) {
      const colour = (data[i] << 16) | (data[i + 1] << 8) | data[i + 2];
      print = (Math.imul(print, 31) + colour) | 0;
      if (data[i + 3]) colours.add(colour >> 2);
    }
    return { print: String(print), colours: colours.size };
  });

async function waitForPicture(timeout = 240000) {
  const end = Date.now() + timeout;
  while (Date.now() < end) {
    if ((await picture()).colours > 50) return true;
    await page.waitForTimeout(200);
  }
  return false;
}

/** Drag, move the slider, switch the passes, play; say what changed the picture. */
async function tryViewer(name) {
  const found = {};
  const box = await page.locator(".d4d-stage canvas").boundingBox();
  const middle = [box.x + box.width / 2, box.y + box.height / 2];
  const place = () => page.evaluate((type) => [...window.app.graph.nodes.find((n) => n.type === type).pos], VIEWER);
  const stood = await place();
  const first = await picture();
  await page.mouse.move(...middle);
  await page.mouse.down();
  await page.mouse.move(middle[0] + 110, middle[1] - 10, { steps: 6 });
  await page.mouse.up();
  await page.waitForTimeout(400);
  const turned = await picture();
  found.drag = turned.print !== first.print && turned.colours > 50;
  found.nodeStayed = String(await place()) === String(stood);
  await shot(`${name}-turned`);
  const slider = page.locator(".d4d-time input");
  found.moments = Number(await slider.getAttribute("max")) + 1;
  await slider.focus();
  for (let step = 0; step < 3; step++) await page.keyboard.press("ArrowRight");
  await page.waitForTimeout(400);
  const later = await picture();
  found.slider = later.print !== turned.print && later.colours > 50;
  for (const pass of ["depth", "normals", "rgb"]) {
    const before = await picture();
    await page.locator(`.d4d-passes button[data-pass="${pass}"]`).click();
    await page.waitForTimeout(800);
    const after = await picture();
    found[pass] = after.print !== before.print && after.colours > 20;
    await shot(`${name}-${pass}`);
  }
  const prints = new Set();
  await page.locator(".d4d-time button").click();
  for (let i = 0; i < 8; i++) {
    await page.waitForTimeout(170);
    prints.add((await picture()).print);
  }
  await page.locator(".d4d-time button").click();
  found.play = prints.size > 2;
  return found;
}

try {
  await open();
  await loadTemplate();
  await lookAt(NAMES.static);
  await shot("loaded");
  await page.locator('[data-testid="queue-button"] button, button[data-testid="queue-button"]').first().click();
  seen.livePreview = await page
    .waitForFunction(() => Object.keys(window.app.nodePreviewImages ?? {}).length > 0, null, { timeout: 180000 })
    .then(() => true, () => false);
  await page.waitForTimeout(700);
  await shot("live-preview");
  await lookAt(VIEWER);
  seen.firstPicture = await waitForPicture();
  await shot("first-picture");
  seen.whole = await page
    .waitForFunction(() => document.querySelector(".d4d-bar")?.hidden, null, { timeout: 240000 })
    .then(() => true, () => false);
  seen.classic = await tryViewer("classic");

  await open();
  await lookAt(VIEWER);
  seen.afterReload = await waitForPicture(20000);
  await shot("after-reload");
  seen.classicAgain = seen.afterReload ? await tryViewer("reloaded") : null;

  await page.evaluate(() => window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", true));
  await page.waitForTimeout(1500);
  await open();
  await lookAt(VIEWER);
  seen.vueNodes = (await page.locator("[data-node-id]").count()) > 0;
  seen.vuePicture = await waitForPicture(20000);
  await shot("vue");
  seen.vue = seen.vuePicture ? await tryViewer("vue") : null;
} catch (error) {
  seen.failed = String(error.stack ?? error);
  await shot("failed").catch(() => {});
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
