// What people do with Modal's client for JavaScript, one case per call: `client.mjs CASE [JSON]`.
//
// Cases assert what they see. Their last line of output is a JSON object for the test that called them.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { createRequire } from "node:module";
import fs from "node:fs";
import https from "node:https";
import { pathToFileURL } from "node:url";

// The package isn't beside this file, but where the test has installed it.
const entry = createRequire(`${process.env.MODAL_PACKAGES}/package.json`).resolve("modal");
const { ModalClient, NotFoundError, InvalidError } = await import(
  pathToFileURL(entry.replace(/\.cjs$/, ".js"))
);
const modal = new ModalClient();
const base = modal.images.fromRegistry("python:3.11-slim");

async function make(options = {}, image = base) {
  const app = await modal.apps.fromName("official", { createIfMissing: true });
  return modal.sandboxes.create(app, image, { command: ["sleep", "infinity"], timeoutMs: 120_000, ...options });
}

async function run(sandbox, command, options = {}) {
  const child = await sandbox.exec(command, options);
  const [out, err] = await Promise.all([child.stdout.readText(), child.stderr.readText()]);
  return [out, err, await child.wait()];
}

async function get(url, certificate) {
  const options = { ca: fs.readFileSync(certificate), agent: false };
  return new Promise((resolve, reject) => {
    https.get(url, options, (answer) => {
      let text = "";
      answer.on("data", (piece) => (text += piece)).on("end", () => resolve(text)).on("error", reject);
    }).on("error", reject);
  });
}

// One sandbox with everything set, used in every way.
async function whole(plan) {
  const image = base
    .dockerfileCommands(["RUN python -m pip install dill"])
    .dockerfileCommands(["ENV FROM_IMAGE='a b'"]);
  const sandbox = await make({
    cpu: 0.5, cpuLimit: 2, memoryMiB: 128, memoryLimitMiB: 4096, workdir: "/work",
    secrets: [await modal.secrets.fromName("known"), await modal.secrets.fromObject({ INLINE: "i" })],
    env: { FROM_ENV: "e" }, tags: { kind: "test", n: "1" }, encryptedPorts: [plan.port],
  }, image);
  const names = "('FROM_IMAGE', 'KNOWN', 'INLINE', 'FROM_ENV', 'OWN')";
  const code = `import os, dill; print([os.environ.get(n) for n in ${names}]); print(os.getcwd())`;
  const [out, err, status] = await run(sandbox, ["python3", "-c", code], { env: { OWN: "o" } });
  const [values, folder] = out.split("\n");
  assert.deepEqual([values, err, status], ["['a b', 'k', 'i', 'e', 'o']", "", 0]);
  assert.ok(folder.endsWith("/work"), folder);

  assert.equal((await run(sandbox, ["sh", "-c", "exit 7"]))[2], 7);
  assert.equal((await run(sandbox, ["sh", "-c", "kill -TERM $$"]))[2], 128 + 15);
  const size = 3 << 20;
  const large = await run(sandbox, ["python3", "-c", `print('x' * ${size}, end='')`]);
  assert.deepEqual([large[0].length, large[2]], [size, 0]);

  await run(sandbox, ["sh", "-c", "echo kept > file"]);
  const copy = await make({ workdir: "/work" }, await sandbox.snapshotFilesystem());
  assert.equal((await run(copy, ["cat", "file"]))[0], "kept\n");
  await copy.terminate();

  await sandbox.exec(["python3", "-m", "http.server", `${plan.port}`, "--bind", "127.0.0.1"]);
  const tunnels = await sandbox.tunnels();
  assert.deepEqual(Object.keys(tunnels), [`${plan.port}`]);
  let page;
  for (let tries = 0; page === undefined; tries++) {
    try {
      page = await get(`${tunnels[plan.port].url}/file`, plan.certificate);
    } catch (error) {
      if (tries > 200) throw error;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
  assert.equal(page, "kept\n");

  const found = [];
  for await (const other of modal.sandboxes.list({ tags: { kind: "test" } })) found.push(other.sandboxId);
  assert.deepEqual(found, [sandbox.sandboxId]);
  const again = await modal.sandboxes.fromId(sandbox.sandboxId);
  assert.equal((await run(again, ["echo", "hi"]))[0], "hi\n");
  assert.equal(await sandbox.poll(), null);
  await sandbox.terminate();
  assert.equal(await again.wait(), 137);
  return { id: sandbox.sandboxId };
}

// Stdin as one stream of messages, with what the options of the server make of it.
async function streams() {
  const sandbox = await make();
  const data = Buffer.alloc(2 << 20, Uint8Array.from({ length: 251 }, (_, n) => n));
  const code = "import sys, hashlib; d = sys.stdin.buffer.read(); print(len(d), hashlib.sha256(d).hexdigest())";
  const child = await sandbox.exec(["python3", "-c", code]);
  // As the client's own files do: what broke is read again from where the server is.
  const pieces = async function* (offset) {
    for (let at = offset; at < data.length; at += 100_000) yield data.subarray(at, at + 100_000);
  };
  await child._stdinWriteStream({ readFrom: pieces });
  const hash = createHash("sha256").update(data).digest("hex");
  assert.equal(await child.stdout.readText(), `${data.length} ${hash}\n`);
  assert.equal(await child.wait(), 0);
  await sandbox.terminate();
  return {};
}

// A conversation over stdin and stdout, which has to be the same whatever goes wrong on the way.
async function talk() {
  const sandbox = await make({}, base.dockerfileCommands(["RUN python -m pip install dill"]));
  const code = "import sys\nfor line in sys.stdin: print('>' + line, end='')";
  const child = await sandbox.exec(["python3", "-u", "-c", code]);
  const reader = child.stdout.getReader();
  let seen = "";
  for (let number = 0; number < 5; number++) {
    await child.stdin.writeText(`${number}\n`);
    while (!seen.endsWith(`>${number}\n`)) {
      const { value, done } = await reader.read();
      assert.ok(!done, seen);
      seen += value;
    }
  }
  await child.closeStdin();
  assert.equal((await reader.read()).done, true);
  assert.equal(seen, ">0\n>1\n>2\n>3\n>4\n");
  assert.equal(await child.wait(), 0);
  await sandbox.terminate();
  return {};
}

// How sandboxes end by themselves.
async function ends() {
  assert.equal(await (await make({ command: ["sh", "-c", "exit 3"] })).wait(), 3);
  assert.equal(await (await make({ timeoutMs: 1000 })).wait(), 124);
  return {};
}

// What Modal doesn't do, and how its client tells people.
async function refused() {
  const long = "y".repeat(70_000);
  for (const [attempt, error] of [
    [async () => modal.secrets.fromName("missing"), NotFoundError],
    [async () => make({}, modal.images.fromRegistry("nowhere.example/none:1")), /failed/],
    [async () => make({}, base.dockerfileCommands(["RUN exit 5"])), /failed/],
    [async () => make({ workdir: "relative" }), /absolute/],
    [async () => (await modal.sandboxes.fromId(`sb-${"1".repeat(40)}`)).poll(), /not found/],
    [async () => modal.apps.fromName("no-such-app"), NotFoundError],
    [async () => (await make()).exec(["echo", long]), InvalidError],
  ]) {
    await assert.rejects(attempt, error, `${attempt}`);
  }
  return {};
}

// Somebody whose token isn't taken.
async function stranger() {
  await assert.rejects(modal.apps.fromName("official", { createIfMissing: true }), /invalid|UNAUTHENTICATED/i);
  return {};
}

const cases = { whole, streams, talk, ends, refused, stranger };
const result = await cases[process.argv[2]](JSON.parse(process.argv[3] ?? "{}"));
modal.close();
console.log(JSON.stringify(result));
process.exit(0);
