// What every part of the page uses: elements, questions to the server, and words for whoever listens.

export const find = (id) => document.getElementById(id);

/** An element with attributes, listeners (on...) and children; what is false or null is left out. */
export const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        if (value === false || value === null || value === undefined) continue;
        if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
        else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
        else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return element;
};

export const button = (text, act, attributes = {}) => make("button", { type: "button", onclick: act, ...attributes }, text);

/** Puts other children into an element; what had the focus keeps it, by its data-key. */
export const redraw = (root, ...children) => {
    const key = root.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    root.replaceChildren(...children.flat());
    if (key) (root.querySelector(`[data-key="${CSS.escape(key)}"]`) ?? root.querySelector("button, input"))?.focus();
};

/** Disabled, with the reason where it can be read. */
export const allow = (element, why) => {
    element.disabled = Boolean(why);
    element.dataset.hint ??= element.title;
    element.title = why || element.dataset.hint;
};

export const says = (text) => {
    find("says").textContent = text;
};

/** Kept in this tab, or in this browser; a browser that keeps nothing is no error. */
export const stored = (place, key, value) => {
    try {
        if (value === undefined) return JSON.parse(place.getItem(key));
        place.setItem(key, JSON.stringify(value));
        return true;
    } catch {
        return value === undefined ? null : false;
    }
};

const named = () => {
    const name = stored(sessionStorage, "visitor") || [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    stored(sessionStorage, "visitor", name);
    return name;
};
const visitor = named();

const post = (path, content, signal) => fetch(`ask/${path}`, {
    method: "POST",
    headers: { "content-type": "application/json", "x-visitor": visitor },
    body: JSON.stringify(content),
    signal,
});

/** What stands in an address, as it is written here or by hand: there a plus is a plus, and no space. */
export const fromAddress = (hash) => new URLSearchParams(/%2[BF]/i.test(hash) ? hash : hash.replaceAll("+", "%2B"));
export const toAddress = (content) => `#${new URLSearchParams(content)}`.replaceAll("+", "%20");

/** The server's answer; what went wrong is its `problem`. */
export const ask = async (path, content = {}) => {
    try {
        const answer = await post(path, content);
        if (answer.headers.get("content-type")?.includes("json")) {
            const said = await answer.json();
            return answer.ok ? said : { problem: said.detail ?? "The server did not understand." };
        }
        return answer.ok ? { blob: await answer.blob() } : { problem: `The server answered ${answer.status}.` };
    } catch {
        return { problem: "The server does not answer; is it still running?" };
    }
};

/** The lines of a run, one message each, until it ends or the signal aborts it. */
export async function* lines(content, signal) {
    const answer = await post("run", content, signal);
    if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        const parts = (rest + value).split("\n");
        rest = parts.pop();
        for (const part of parts) yield JSON.parse(part);
    }
}

export const copy = async (text, what) => {
    if (navigator.clipboard) {
        await navigator.clipboard.writeText(text);
        says(`${what} is copied.`);
        return true;
    }
    window.prompt("Copy this:", text); // browsers offer no clipboard to pages without https
    return false;
};

export const download = (href, name) => make("a", { href, download: name }).click();

export const stamp = () => new Date().toISOString().slice(0, 19).replaceAll(/[-:]/g, "").replace("T", "-");

/** An image that has been decoded. */
export const loaded = async (source) => {
    const image = new Image();
    image.src = source;
    await image.decode();
    return image;
};
