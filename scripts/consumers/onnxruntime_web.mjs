// Runs the graphs of a model folder in ONNX Runtime Web, in a page of headless Chromium, each from the bytes of its one file, and
// compares the results with onnxruntime-node's. Prints the largest difference of each; fails above 1e-3.
//
//   node onnxruntime_web.mjs FOLDER [DEVICE] [TOKENS]
//
// DEVICE is `wasm` or `webgpu`; the latter runs on Chromium's software adapter. The decoder gets a prompt of TOKENS (36) tokens.
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import ort from 'onnxruntime-node';
import { run } from './page.mjs';

const [folder, device = 'wasm', tokens = '36'] = process.argv.slice(2);
const root = path.resolve(folder);
const files = fs.readdirSync(root, { recursive: true }).filter((file) => file.endsWith('.onnx')).sort();

// Made-up inputs, the same for the same sizes. A free size is 1, or the prompt's tokens.
function made({ name, type, shape }, count) {
  const past = name.startsWith('past');
  const free = (size, axis) => (typeof size === 'number' ? size : past && axis === 2 ? 0 : axis === 1 ? count : 1);
  const dims = shape.map(free);
  const total = dims.reduce((product, size) => product * size, 1);
  const number = (index) => {
    if (name === 'position_ids') return index % count;
    if (type === 'int64') return name === 'attention_mask' ? 1 : 8 + ((index * 37) % 400);
    return type === 'bool' ? 1 : Math.sin(index * 0.7 + (index % 13));
  };
  const data = Array.from({ length: total }, (_, index) => number(index));
  return { type, dims, data };
}

const cases = [];
for (const file of files) {
  const session = await ort.InferenceSession.create(path.join(root, file));
  const inputs = Object.fromEntries(session.inputMetadata.map((port) => [port.name, made(port, Number(tokens))]));
  const tensor = ({ type, dims, data }) => new ort.Tensor(type, type === 'int64' ? data.map(BigInt) : data, dims);
  const given = Object.fromEntries(Object.entries(inputs).map(([name, value]) => [name, tensor(value)]));
  const results = await session.run(given);
  cases.push({ file, inputs, wanted: Object.fromEntries(Object.entries(results).map(([name, value]) => [name, [...value.data]])) });
}
const data = fs.mkdtempSync(path.join(os.tmpdir(), 'web-'));
fs.writeFileSync(path.join(data, 'cases.json'), JSON.stringify(cases));

const script = `
  const ort = await import('onnxruntime-web/webgpu');
  ort.env.wasm.wasmPaths = '/modules/onnxruntime-web/dist/';
  const tensor = ({ type, dims, data }) => new ort.Tensor(type, type === 'int64' ? data.map(BigInt) : data, dims);
  for (const { file, inputs, wanted } of await (await fetch('/data/cases.json')).json()) {
    const bytes = new Uint8Array(await (await fetch('/model/' + file)).arrayBuffer());
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ['${device}'] });
    for (let round = 0; round < 3; round++) {
      const given = Object.fromEntries(Object.entries(inputs).map(([name, value]) => [name, tensor(value)]));
      const results = await session.run(given);
      let apart = 0, largest = 0;
      for (const [name, numbers] of Object.entries(wanted)) {
        const found = await results[name].getData();
        numbers.forEach((number, at) => {
          apart = Math.max(apart, Math.abs(number - Number(found[at])));
          largest = Math.max(largest, Math.abs(number));
        });
      }
      await report({ file, round, apart, largest });
    }
    await session.release();
  }`;

let worst = 0;
const code = await run(script, { model: root, data }, ({ file, round, apart, largest }) => {
  worst = Math.max(worst, Number.isFinite(apart) ? apart : Infinity);
  console.log(`${file}, ${device}, run ${round + 1}: largest difference ${apart.toExponential(1)}, of numbers up to ${largest.toPrecision(3)}`);
}, device === 'webgpu');
fs.rmSync(data, { recursive: true });
process.exit(code === 0 && worst <= 1e-3 ? 0 : 1);
