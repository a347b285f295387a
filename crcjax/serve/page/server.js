// How the page's parts talk to the service, and to the person in front of it.

export const element = (id) => document.getElementById(id);

export class ServiceError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

// The session's second secret, which every change needs.
export const session = { csrf: "", account: null };

export async function call(method, path, { json, body, headers = {} } = {}) {
  const options = { method, headers: { ...headers, "X-CSRF-Token": session.csrf }, credentials: "same-origin" };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers["Content-Type"] = "application/json";
  } else if (body !== undefined) {
    options.body = body;
    options.headers["Content-Type"] = "application/octet-stream";
  }
  const response = await fetch(path, options);
  if (!response.ok) {
    const problem = await response.json().catch(() => ({ detail: response.statusText }));
    throw new ServiceError(response.status, problem.detail);
  }
  return response;
}

export const getJson = async (path) => (await call("GET", path)).json();

const VIEWS = ["sign-in-view", "work-view", "account-view", "result-view"];

export function show(view) {
  for (const id of VIEWS) {
    element(id).hidden = id !== view;
  }
}

export function say(text) {
  element("message").textContent = text;
}

let onSignedOut = () => {};

export function whenSignedOut(action) {
  onSignedOut = action;
}

// Runs an action of the user; what goes wrong is said on the page.
export async function attempt(action) {
  say("");
  try {
    await action();
  } catch (error) {
    if (error.status === 401 && session.account) {
      onSignedOut();
    }
    say(error.message);
  }
}

export function onSubmit(id, action) {
  element(id).addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(() => action(event.target.elements, event.target));
  });
}

export function button(text, label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  if (label) {
    made.setAttribute("aria-label", label);
  }
  made.addEventListener("click", () => attempt(action));
  return made;
}

export function made(tag, text = "", properties = {}) {
  const node = document.createElement(tag);
  node.textContent = text;
  return Object.assign(node, properties);
}
