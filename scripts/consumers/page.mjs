// Runs a module script in a page of headless Chromium, served from this machine.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import http from 'node:http';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const scripts = path.dirname(fileURLToPath(import.meta.url));
const modules = fileURLToPath(import.meta.resolve('@huggingface/transformers')).split('@huggingface')[0];
const imports = {
  '@huggingface/transformers': '/modules/@huggingface/transformers/dist/transformers.web.js',
  'onnxruntime-common': '/modules/onnxruntime-common/dist/esm/index.js',
  'onnxruntime-web/webgpu': '/modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs',
};
const kinds = { '.mjs': 'text/javascript', '.js': 'text/javascript', '.wasm': 'application/wasm', '.json': 'application/json' };
// These two headers give the page threads.
const shared = { 'Cross-Origin-Opener-Policy': 'same-origin', 'Cross-Origin-Embedder-Policy': 'require-corp' };
const software = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan'];

const page = (script) => `<!doctype html><meta charset="utf-8"><title>page</title>
<script type="importmap">${JSON.stringify({ imports })}</script>
<script type="module">
const post = (kind, body) => fetch('/' + kind, { method: 'POST', body: JSON.stringify(body) });
const report = (line) => post('line', line);
try {
${script}
  await post('done', {});
} catch (error) {
  await post('failed', String(error.stack ?? error));
}
</script>`;

// Runs `script`, which may `await report(value)` and import the modules above and those of this folder under `/scripts/`.
// `folders` are served under their names, `found` gets each reported value. With `webgpu` the page has Chromium's software
// adapter. The browser is `chromium`, or what the variable CHROMIUM names. Gives the exit status.
export async function run(script, folders, found, webgpu) {
  const roots = new Map([['modules', modules], ['scripts', scripts], ...Object.entries(folders)]);
  let end;
  const status = new Promise((resolve) => (end = resolve));

  async function handle(request, response) {
    if (request.method === 'POST') {
      const parts = [];
      for await (const part of request) parts.push(part);
      const body = JSON.parse(Buffer.concat(parts).toString());
      response.end();
      if (request.url === '/line') return found(body);
      if (request.url === '/failed') console.error(body);
      return end(request.url === '/done' ? 0 : 1);
    }
    const [, root, ...rest] = decodeURIComponent(new URL(request.url, 'http://localhost').pathname).split('/');
    if (root === '') return response.writeHead(200, { 'Content-Type': 'text/html', ...shared }).end(page(script));
    const file = path.join(roots.get(root) ?? '', ...rest);
    if (!roots.has(root) || rest.includes('..') || !fs.existsSync(file) || !fs.statSync(file).isFile()) {
      return response.writeHead(404, shared).end();
    }
    const kind = kinds[path.extname(file)] ?? 'application/octet-stream';
    response.writeHead(200, { 'Content-Type': kind, 'Content-Length': fs.statSync(file).size, ...shared });
    return fs.createReadStream(file).pipe(response);
  }

  const server = http.createServer(handle);
  await new Promise((ready) => server.listen(0, '127.0.0.1', ready));
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'page-'));
  const flags = ['--headless=new', '--no-sandbox', '--no-first-run', `--user-data-dir=${profile}`];
  const adapter = webgpu ? software : ['--disable-gpu'];
  const address = `http://127.0.0.1:${server.address().port}/`;
  const browser = spawn(process.env.CHROMIUM ?? 'chromium', [...flags, ...adapter, address], { stdio: 'ignore' });
  const gone = new Promise((resolve) => browser.once('exit', resolve).once('error', resolve));
  gone.then(() => end(1));
  process.once('SIGTERM', () => end(1)).once('SIGINT', () => end(1));
  const code = await status;
  browser.kill();
  await gone;
  server.close();
  fs.rmSync(profile, { recursive: true, force: true, maxRetries: 5, retryDelay: 200 });
  return code;
}
