// Answers the questions of a benchmark with transformers.js and prints one JSON line per question.
//
//   node transformers_js.mjs FOLDER BENCHMARK.tsv [QUESTIONS]
import fs from 'node:fs';
import path from 'node:path';
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from '@huggingface/transformers';

const [folder, benchmark, questions = '20'] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + '/';
const name = path.basename(folder);
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype: 'fp32', device: 'cpu' });

// Rows as VLMEvalKit writes them; cells with quotes are none of the pictures and of the plain questions used here.
const [head, ...rows] = fs.readFileSync(benchmark, 'utf8').trimEnd().split(/\r?\n/).map((line) => line.split('\t'));
const column = (row, key) => row[head.indexOf(key)] ?? '';
const pictures = new Map(rows.map((row) => [column(row, 'index'), column(row, 'image')]));

function prompt(row) {
  const letters = [...'ABCDEFGH'].filter((letter) => column(row, letter) !== '');
  if (letters.length === 0) return column(row, 'question');
  const options = letters.map((letter) => `${letter}. ${column(row, letter)}\n`).join('');
  return `Question: ${column(row, 'question')}\nOptions:\n${options}Please select the correct answer from the options above. \n`;
}

for (const row of rows.slice(0, Number(questions))) {
  const cell = column(row, 'image');
  const bytes = Buffer.from(cell.length > 64 ? cell : pictures.get(cell), 'base64');
  const image = await RawImage.fromBlob(new Blob([bytes]));
  const content = [{ type: 'image' }, { type: 'text', text: prompt(row) }];
  const text = processor.apply_chat_template([{ role: 'user', content }], { add_generation_prompt: true });
  const inputs = await processor(text, [image], { add_special_tokens: false });
  const ids = await model.generate({ ...inputs, max_new_tokens: 16, do_sample: false });
  const answer = processor.batch_decode(ids.slice(null, [inputs.input_ids.dims.at(-1), null]), { skip_special_tokens: true })[0];
  console.log(JSON.stringify({ index: column(row, 'index'), prediction: answer.trim() }));
}
