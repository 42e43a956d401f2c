// Questions of a benchmark and the answers of transformers.js; runs in Node and in a page.
import { AutoModelForImageTextToText, AutoProcessor, RawImage } from '@huggingface/transformers';

// Rows as VLMEvalKit writes them; cells with quotes are none of the pictures and of the plain questions used here.
function rows(benchmark) {
  const [head, ...lines] = benchmark.trimEnd().split(/\r?\n/).map((line) => line.split('\t'));
  return lines.map((line) => (key) => line[head.indexOf(key)] ?? '');
}

function prompt(column) {
  const letters = [...'ABCDEFGH'].filter((letter) => column(letter) !== '');
  if (letters.length === 0) return column('question');
  const options = letters.map((letter) => `${letter}. ${column(letter)}\n`).join('');
  return `Question: ${column('question')}\nOptions:\n${options}Please select the correct answer from the options above. \n`;
}

// Answers the first `questions` rows with the model `name` and gives each answer to `found`. `options` are those of
// `from_pretrained`: `dtype` (a name or one for each component) and `device`.
export async function answer(name, benchmark, questions, options, found) {
  const processor = await AutoProcessor.from_pretrained(name);
  const model = await AutoModelForImageTextToText.from_pretrained(name, options);
  const all = rows(benchmark);
  const pictures = new Map(all.map((column) => [column('index'), column('image')]));
  for (const column of all.slice(0, questions)) {
    const cell = column('image');
    const bytes = Uint8Array.from(atob(cell.length > 64 ? cell : pictures.get(cell)), (letter) => letter.charCodeAt(0));
    const image = await RawImage.fromBlob(new Blob([bytes]));
    const content = [{ type: 'image' }, { type: 'text', text: prompt(column) }];
    const text = processor.apply_chat_template([{ role: 'user', content }], { add_generation_prompt: true });
    const inputs = await processor(text, [image], { add_special_tokens: false });
    const ids = await model.generate({ ...inputs, max_new_tokens: 16, do_sample: false });
    const answers = processor.batch_decode(ids.slice(null, [inputs.input_ids.dims.at(-1), null]), { skip_special_tokens: true });
    await found({ index: column('index'), prediction: answers[0].trim() });
  }
}

// `q4` or `decoder_model_merged=q4,vision_encoder=fp16`, as `from_pretrained` takes it.
export function dtypes(text) {
  if (!text.includes('=')) return text;
  return Object.fromEntries(text.split(',').map((part) => part.split('=')));
}
