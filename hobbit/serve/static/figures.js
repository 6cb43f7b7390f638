// What the charts show, from two of the server's stats; no page is needed for this.

const MIB = 1048576;

// The share of a difference, or null where nothing was counted.
function share(part, whole) {
  return whole > 0 ? part / whole : null;
}

// Returns one number for each chart for the time between two stats; null is "nothing to say".
export function figures(before, now) {
  const since = (name) => now.stats[name] - before.stats[name];
  const tokens = since("tokens_generated");
  const read = since("read_bytes") / MIB;
  const pairs = since("pairs_high") + since("pairs_low") + since("pairs_skip");
  const all = since("tokens_prompt") + tokens;
  return {
    rate: tokens > 0 ? share(tokens, since("decode_s")) : null,
    hit: share(since("hits"), since("hits") + since("misses")),
    device: now.device ? share(since("device_hits"), since("hits") + since("misses")) : null,
    high: share(since("pairs_high"), pairs),
    low: share(since("pairs_low"), pairs),
    read: all > 0 ? read / all : null,
    stall: share(since("stall_s"), since("prompt_s") + since("decode_s")),
    memory: share(now.resident_bytes, now.stats.cap_bytes),
  };
}

// Says what the server does, in words.
export function state(now) {
  const waiting = now.queue.waiting ? `, ${now.queue.waiting} waiting` : "";
  if (now.state === "prompt") return `reading a prompt, ${now.prompt.done} of ${now.prompt.total} tokens${waiting}`;
  if (now.state === "answer") return `answering, ${now.generating} tokens${waiting}`;
  if (now.state === "loading") return `loading the model${waiting}`;
  if (now.state === "asleep") return "the model is not loaded: a message loads it";
  return `idle, ${now.requests.answered} answered`;
}

// Returns a polyline's points over 100 x 30; what is null leaves no point.
export function line(values, most, length) {
  const top = most || Math.max(...values.filter((v) => v !== null), 1e-9);
  return values
    .map((v, i) => (v === null ? "" : `${(100 * i) / (length - 1)},${29 - (28 * Math.min(v, top)) / top}`))
    .filter(Boolean)
    .join(" ");
}

// Splits a text of server-sent events: [data of the events, what is not complete yet].
export function events(text) {
  const blocks = text.split("\n\n");
  const rest = blocks.pop();
  const data = blocks.flatMap((block) => block.split("\n")).filter((l) => l.startsWith("data: "));
  return [data.map((l) => l.slice(6)), rest];
}
