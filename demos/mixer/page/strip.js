// The film strip: past mixes with their pictures, kept in this browser.
import { button, find, make, says, stored } from "./base.js";

const KEY = "mixer film strip";
const MOST = 40;
const root = find("strip");
let items = stored(localStorage, KEY) ?? [];
let picked = []; // ids, to compare
let restore = () => {};

export const onRestore = (act) => { restore = act; };

const write = () => {
    while (items.length > MOST || !stored(localStorage, KEY, items)) { // a full browser keeps the newest, and stars
        const last = items.findLastIndex((item) => !item.star);
        if (items.length < 2) return;
        items.splice(last < 0 ? items.length - 1 : last, 1);
    }
};

/** Adds what a run ended with: {recipe, words, seed, chains, steps, picture, count, live}. */
export const keep = (item) => {
    if (items[0]?.picture === item.picture) return;
    items.unshift({ ...item, id: Date.now(), star: false });
    write();
    draw();
};

const remove = (id) => {
    items = items.filter((item) => item.id !== id);
    picked = picked.filter((each) => each !== id);
    write();
    draw();
};

const star = (item) => {
    item.star = !item.star;
    write();
    draw();
    says(item.star ? "Starred: it is kept." : "No longer starred.");
};

const compare = (id) => {
    picked = picked.includes(id) ? picked.filter((each) => each !== id) : [...picked, id].slice(-2);
    draw();
    if (picked.length < 2) return says("Choose another one to compare it with.");
    const dialog = find("compare");
    const two = picked.map((each) => items.find((item) => item.id === each));
    dialog.replaceChildren(
        make("h2", { id: "compare-title" }, "Side by side"),
        make("div", { class: "two" }, two.map((item) => make(
            "figure", {}, make("img", { src: item.picture, alt: `${item.count} pictures: ${item.words}`, class: "pixels" }),
            make("figcaption", {}, item.words, make("small", {}, `seed ${item.seed}${item.live ? ", live" : ""}`)),
        ))),
        button("Close", () => dialog.close(), { class: "main" }),
    );
    dialog.showModal();
    dialog.addEventListener("close", () => { picked = []; draw(); }, { once: true });
};

const draw = () => {
    const focus = root.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const cards = items.map((item) => make(
        "li", { class: item.star ? "starred" : null },
        make("button", {
            type: "button", class: "frame", onclick: () => restore(item), "data-key": `show ${item.id}`,
            title: `Brings back: ${item.words}`, "aria-label": `Bring back ${item.words}, seed ${item.seed}`,
        }, make("img", { src: item.picture, alt: "", class: "pixels" }), make("span", {}, item.words)),
        make("div", { class: "acts" },
            button(item.star ? "★" : "☆", () => star(item), { "aria-label": "Star", "aria-pressed": String(item.star), title: "Starred ones are kept longest", "data-key": `star ${item.id}` }),
            button("⇄", () => compare(item.id), { "aria-label": "Compare", "aria-pressed": String(picked.includes(item.id)), title: "Compares two side by side", "data-key": `compare ${item.id}` }),
            button("×", () => remove(item.id), { "aria-label": "Remove", title: "Removes it from the strip", "data-key": `remove ${item.id}` })),
    ));
    root.replaceChildren(
        make("h2", {}, "Film strip", make("small", {}, items.length ? "" : " what you make is kept here, in this browser")),
        items.length ? make("ul", { class: "film", tabindex: 0, "aria-label": "Past mixes" }, cards) : "",
    );
    if (focus) root.querySelector(`[data-key="${focus}"]`)?.focus();
};
draw();
