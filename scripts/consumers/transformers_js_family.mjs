// Compares greedy answers of transformers.js with Hugging Face's, for the tiny network of a family; fails unless all are equal.
//
//   python family_cases.py EXPECTED.json dense|pruned | node transformers_js_family.mjs FOLDER [cpu|webgpu]
import path from 'node:path';
import { createInterface } from 'node:readline';
import { AutoModelForImageTextToText, Tensor, env } from '@huggingface/transformers';

const folder = path.resolve(process.argv[2]);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder) + '/';
const model = await AutoModelForImageTextToText.from_pretrained(path.basename(folder), { dtype: 'fp32', device: process.argv[3] ?? 'cpu' });
const end = model.generation_config.eos_token_id ?? model.config.eos_token_id;
const ends = [end].flat();

let equal = 0;
let asked = 0;
for await (const line of createInterface({ input: process.stdin })) {
  const { name, arrays, answer } = JSON.parse(line);
  const made = ({ type, dims, data }) => new Tensor(type, type === 'int64' ? data.map(BigInt) : data, dims);
  const inputs = Object.fromEntries(Object.entries(arrays).map(([key, value]) => [key, made(value)]));
  const cut = answer.findIndex((token) => ends.includes(token));
  const wanted = cut < 0 ? answer : answer.slice(0, cut);
  const ids = await model.generate({ ...inputs, max_new_tokens: answer.length, do_sample: false });
  const found = ids.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number).filter((token) => !ends.includes(token)).slice(0, wanted.length);
  asked += 1;
  const same = JSON.stringify(found) === JSON.stringify(wanted);
  equal += same;
  if (!same) console.error(`${name}: ${found}, expected ${wanted}`);
}
console.log(`transformers.js ${env.version}: ${equal} of ${asked} answers of ${path.basename(folder)} equal Hugging Face's`);
process.exit(asked > 0 && equal === asked ? 0 : 1);
