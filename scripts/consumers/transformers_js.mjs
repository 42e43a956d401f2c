// Answers the questions of a benchmark with transformers.js in Node and prints one JSON line per question.
//
//   node transformers_js.mjs FOLDER BENCHMARK.tsv [QUESTIONS] [DTYPE] [DEVICE]
//
// DTYPE is a name (fp32, q4, ..) or one for each component: decoder_model_merged=q4,embed_tokens=q4
// DEVICE is cpu (the default), webgpu, which needs a Vulkan driver, or config for the one that the folder's config names.
import fs from 'node:fs';
import path from 'node:path';
import { env } from '@huggingface/transformers';
import { answer, dtypes } from './transformers_js_questions.mjs';

const [folder, benchmark, questions = '20', dtype = 'fp32', device = 'cpu'] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + '/';
const options = { dtype: dtypes(dtype), device: device === 'config' ? undefined : device };
await answer(path.basename(folder), fs.readFileSync(benchmark, 'utf8'), Number(questions), options, (line) =>
  console.log(JSON.stringify(line)),
);
