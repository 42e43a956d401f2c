// Times two folders of `export --to transformers-js` in Node in alternating runs: first token of a prompt, next tokens.
//
//   node transformers_js_speed.mjs FOLDER DENSE_FOLDER
//
// The times are of the processor, with one thread in ONNX Runtime, so that other programs on the machine do not count.
import path from 'node:path';
import { AutoModelForImageTextToText, Tensor, env } from '@huggingface/transformers';

const [prompt, tokens, rounds, warmUps] = [256, 64, 41, 20];
const folders = process.argv.slice(2).map((folder) => path.resolve(folder));
if (folders.length !== 2) throw new Error('usage: node transformers_js_speed.mjs FOLDER DENSE_FOLDER');
env.allowRemoteModels = false;
const models = [];
for (const folder of folders) {
  env.localModelPath = path.dirname(folder) + '/';
  const session_options = { intraOpNumThreads: 1, interOpNumThreads: 1 };
  models.push(await AutoModelForImageTextToText.from_pretrained(path.basename(folder), { dtype: 'fp32', device: 'cpu', session_options }));
}
const ids = Array.from({ length: prompt }, (_, place) => BigInt(((place * 37) % 400) + 8));
const row = (values) => new Tensor('int64', values, [1, prompt]);

// Milliseconds of the processor for an answer of `count` tokens.
async function time(model, count) {
  const inputs = { input_ids: row(ids), attention_mask: row(ids.map(() => 1n)) };
  const start = process.cpuUsage();
  await model.generate({ ...inputs, max_new_tokens: count, min_new_tokens: count, do_sample: false });
  const { user, system } = process.cpuUsage(start);
  return (user + system) / 1e3;
}

function median(values) {
  return values.toSorted((a, b) => a - b)[values.length >> 1];
}

// Node compiles what runs often: until then a prompt takes twice as long.
for (let round = 0; round < warmUps; round += 1) for (const model of models) await time(model, 4);
const times = { first: [[], []], next: [[], []] };
// Prompts have rounds of their own: the garbage of a long answer is collected while the next call runs, and counts there.
for (let round = 0; round < rounds; round += 1) {
  for (const [side, model] of models.entries()) times.first[side].push(await time(model, 1));
}
for (let round = 0; round < rounds; round += 1) {
  for (const [side, model] of models.entries()) {
    times.next[side].push(((await time(model, tokens + 1)) - median(times.first[side])) / tokens);
  }
}
console.log(`transformers.js ${env.version}, one thread, prompt of ${prompt} tokens, ${tokens} generated`);
for (const [name, sides] of Object.entries(times)) {
  const [own, dense] = sides.map(median);
  const ratio = (dense / own).toFixed(2);
  console.log(`${name} token: ${own.toFixed(2)} ms, dense ${dense.toFixed(2)} ms, ratio ${ratio} (medians of ${rounds} alternating runs)`);
}
