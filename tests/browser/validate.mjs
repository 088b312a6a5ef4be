// What the Khronos validator says of a GLB file, as JSON: node validate.mjs FILE; tests/export/test_gltf.py judges.

import { readFile } from "node:fs/promises";
import validator from "gltf-validator";

const report = await validator.validateBytes(new Uint8Array(await readFile(process.argv[2])));
console.log(JSON.stringify(report.issues));
