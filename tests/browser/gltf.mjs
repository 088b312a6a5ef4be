// Show a GLB file in three.js and save what is seen: node gltf.mjs CHROMIUM FILE FOLDER SIZE CAMERAS [LOOK]
// CAMERAS: JSON of [{position: [x, y, z], fov (degrees), seconds}], looking at the origin, or with {matrix, near, far}
// instead of the position; tests/export/test_three.py judges the images.
// LOOK: JSON of {clip: the number of the only one that plays, bare: base colours without light, before nothing}.

import { createServer } from "node:http";
import { readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { chromium } from "playwright-core";

const [executablePath, file, folder, size, cameras, look = "{}"] = process.argv.slice(2);
const here = import.meta.dirname;
const modules = { three: "/node_modules/three/build/three.module.js", "three/addons/": "/node_modules/three/examples/jsm/" };
const html = `<!doctype html><link rel="icon" href="data:,"><body style="margin:0">
<script type="importmap">${JSON.stringify({ imports: modules })}</script>
<script type="module">
import * as THREE from "three";
import { GLTFLoader } from "three/addons/loaders/GLTFLoader.js";
try {
  const model = await new GLTFLoader().loadAsync("/model.glb");
  const { clip: only, bare } = ${look};
  const renderer = new THREE.WebGLRenderer({ preserveDrawingBuffer: true, alpha: Boolean(bare) });
  renderer.setSize(${size}, ${size});
  const scene = new THREE.Scene().add(model.scene);
  const mixer = new THREE.AnimationMixer(model.scene);
  for (const [number, clip] of model.animations.entries()) {
    if (only === undefined || only === number) mixer.clipAction(clip).play();
  }
  if (bare) {
    model.scene.traverse((part) => {
      part.frustumCulled = false;
      if (!part.material) return;
      const { color, map, vertexColors, alphaTest, side } = part.material;
      part.material = new THREE.MeshBasicMaterial({ color, map, vertexColors, alphaTest, side });
    });
  }
  window.shot = ({ position, matrix, fov, seconds, near = 0.01, far = 100 }) => {
    mixer.setTime(seconds);
    const camera = new THREE.PerspectiveCamera(fov, 1, near, far);
    if (matrix) {
      camera.matrix.fromArray(matrix).decompose(camera.position, camera.quaternion, camera.scale);
    } else {
      camera.position.set(...position);
      camera.lookAt(0, 0, 0);
    }
    renderer.render(scene, camera);
    return renderer.domElement.toDataURL("image/png");
  };
  window.seen = { clips: model.animations.map((clip) => clip.duration) };
} catch (error) {
  window.seen = { error: String(error) };
}
</script>`;
const server = createServer(async ({ url }, answer) => {
  try {
    if (url === "/") answer.setHeader("content-type", "text/html").end(html);
    else if (url === "/model.glb") answer.end(await readFile(file));
    else answer.setHeader("content-type", "text/javascript").end(await readFile(path.join(here, url)));
  } catch {
    answer.writeHead(404).end();
  }
}).listen(0, "127.0.0.1");
const args = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"];
const browser = await chromium.launch({ executablePath, args: [...args, "--ignore-gpu-blocklist"] });
const page = await browser.newPage();
const errors = [];
page.on("pageerror", (error) => errors.push(error.message));
page.on("console", (message) => ["error", "warning"].includes(message.type()) && errors.push(message.text()));
await page.goto(`http://127.0.0.1:${server.address().port}/`);
await page.waitForFunction(() => window.seen, null, { timeout: 120000 });
const seen = await page.evaluate(() => window.seen);
if (!seen.error) {
  for (const [number, camera] of JSON.parse(cameras).entries()) {
    const image = await page.evaluate((wanted) => window.shot(wanted), camera);
    await writeFile(path.join(folder, `${number}.png`), Buffer.from(image.split(",")[1], "base64"));
  }
}
console.log(JSON.stringify({ ...seen, errors: errors.filter((text) => !/GPU stall|swiftshader/i.test(text)) }));
await browser.close();
server.close();
