// Talking to the site's own server: JSON, pixels, and drafts as they are written. Nothing else is contacted.

export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("fedrad-token", given);
    history.replaceState(null, "", location.pathname);
  }
}
export const setToken = (token) => sessionStorage.setItem("fedrad-token", token.trim());

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem("fedrad-token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(`/page/api/${path}`, { ...options, headers, credentials: "same-origin" });
  if (response.ok) return response;
  let error = {};
  try { error = (await response.json()).error ?? {}; } catch { /* a proxy's page, not ours */ }
  throw new Refused(response.status, error.code ?? String(response.status), error.message ?? response.statusText);
}

const json = async (path, options) => (await ask(path, options)).json();
const post = (path, value) =>
  json(path, { method: "POST", body: JSON.stringify(value), headers: { "Content-Type": "application/json" } });

export const about = () => json("about");
export const cases = async () => (await json("cases")).cases;
export const oneCase = (id) => json(`cases/${id}`);
export const similar = (id) => json(`cases/${id}/similar`);
export const addExamples = () => post("examples", {});
export const decide = (id, decision) => post(`cases/${id}/decision`, decision);

const TYPES = { png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", dcm: "application/dicom" };
export const upload = (file) => json("cases", {
  method: "POST", body: file,
  headers: { "Content-Type": TYPES[file.name.split(".").pop().toLowerCase()] ?? "application/dicom" },
});

export async function pixels(id, signal) {
  const response = await ask(`cases/${id}/pixels`, { signal });
  const rows = Number(response.headers.get("X-Rows")), columns = Number(response.headers.get("X-Columns"));
  return { rows, columns, values: new Uint16Array(await response.arrayBuffer()) };
}

export async function priorPicture(number) {
  return createImageBitmap(await (await ask(`priors/${number}`)).blob());
}

// Each row of `values` is one token's weights over side × side patches; `box` is where they lie on the picture.
export async function grounding(id, signal) {
  const found = await json(`cases/${id}/grounding`, { signal });
  const bytes = Uint8Array.from(atob(found.values), (c) => c.charCodeAt(0));
  const values = new Float32Array(bytes.buffer), width = found.side * found.side;
  const rows = Array.from({ length: found.tokens }, (_, i) => values.subarray(i * width, (i + 1) * width));
  return { side: found.side, box: found.box, rows };
}

// Yields {name, value} for each server-sent event.
export async function* draft(id, signal) {
  const response = await ask(`cases/${id}/draft`, { method: "POST", signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) {
        const [, name, data] = block.match(/^event: (.+)\ndata: (.*)$/);
        yield { name, value: JSON.parse(data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
