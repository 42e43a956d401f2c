// Answers the questions of a benchmark with transformers.js in a page of headless Chromium; prints one JSON line per question.
//
//   node transformers_js_page.mjs FOLDER BENCHMARK.tsv [QUESTIONS] [DTYPE] [DEVICE]
//
// DTYPE as for transformers_js.mjs. DEVICE is `wasm` or `webgpu`; the latter runs on Chromium's software adapter.
import path from 'node:path';
import { run } from './page.mjs';

const [folder, benchmark, questions = '20', dtype = 'fp32', device = 'wasm'] = process.argv.slice(2);
const settings = { name: path.basename(path.resolve(folder)), questions: Number(questions), dtype, device };

const script = `
  const { env } = await import('@huggingface/transformers');
  const { answer, dtypes } = await import('/scripts/transformers_js_questions.mjs');
  const { name, questions, dtype, device } = ${JSON.stringify(settings)};
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false, localModelPath: '/models/' });
  env.backends.onnx.wasm.wasmPaths = '/modules/onnxruntime-web/dist/';
  const benchmark = await (await fetch('/data/${path.basename(benchmark)}')).text();
  await answer(name, benchmark, questions, { dtype: dtypes(dtype), device }, report);`;

const folders = { models: path.dirname(path.resolve(folder)), data: path.dirname(path.resolve(benchmark)) };
process.exit(await run(script, folders, (line) => console.log(JSON.stringify(line)), device === 'webgpu'));
