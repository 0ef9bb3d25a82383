// The film strip: past mixes with their pictures, kept in this browser.
import { button, find, make, redraw, says, stored } from "./base.js";
import { state } from "./state.js";

const KEY = "mixer film strip";
const MOST = 40;
const root = find("strip");
let restore = () => {};

export const onRestore = (act) => { restore = act; };

const write = () => {
    const { film } = state;
    while (film.length > MOST || !stored(localStorage, KEY, film)) { // a full browser keeps the newest, and stars
        const last = film.findLastIndex((item) => !item.star);
        if (film.length < 2) return;
        film.splice(last < 0 ? film.length - 1 : last, 1);
    }
};

/** Adds what a run ended with: {recipe, words, seed, chains, steps, picture, live}. */
export const keep = (item) => {
    if (state.film[0]?.picture === item.picture) return;
    state.film.unshift({ ...item, id: Date.now(), star: false });
    write();
    draw();
};

const remove = (id) => {
    state.film = state.film.filter((item) => item.id !== id);
    state.compared = state.compared.filter((each) => each !== id);
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
    const { compared } = state;
    state.compared = compared.includes(id) ? compared.filter((each) => each !== id) : [...compared, id].slice(-2);
    draw();
    if (state.compared.length < 2) return says("Choose another one to compare it with.");
    const dialog = find("compare");
    const two = state.compared.map((each) => state.film.find((item) => item.id === each));
    dialog.replaceChildren(
        make("h2", { id: "compare-title" }, "Side by side"),
        make("div", { class: "two" }, two.map((item) => make(
            "figure", {}, make("img", { src: item.picture, alt: `${item.chains} pictures: ${item.words}`, class: "pixels" }),
            make("figcaption", {}, item.words, make("small", {}, `seed ${item.seed}${item.live ? ", live" : ""}`)),
        ))),
        button("Close", () => dialog.close(), { class: "main" }),
    );
    dialog.showModal();
    dialog.addEventListener("close", () => { state.compared = []; draw(); }, { once: true });
};

const draw = () => {
    const cards = state.film.map((item) => make(
        "li", { class: item.star ? "starred" : null },
        make("button", {
            type: "button", class: "frame", onclick: () => restore(item), "data-key": `show ${item.id}`,
            title: `Brings back: ${item.words}`, "aria-label": `Bring back ${item.words}, seed ${item.seed}`,
        }, make("img", { src: item.picture, alt: "", class: "pixels" }), make("span", {}, item.words)),
        make("div", { class: "acts" },
            button(item.star ? "★" : "☆", () => star(item), { "aria-label": "Star", "aria-pressed": String(item.star), title: "Starred ones are kept longest", "data-key": `star ${item.id}` }),
            button("⇄", () => compare(item.id), { "aria-label": "Compare", "aria-pressed": String(state.compared.includes(item.id)), title: "Compares two side by side", "data-key": `compare ${item.id}` }),
            button("×", () => remove(item.id), { "aria-label": "Remove", title: "Removes it from the strip", "data-key": `remove ${item.id}` })),
    ));
    redraw(
        root,
        make("h2", {}, "Film strip", make("small", {}, cards.length ? "" : " what you make is kept here, in this browser")),
        cards.length ? make("ul", { class: "film", tabindex: 0, "aria-label": "Past mixes" }, cards) : "",
    );
};
state.film = stored(localStorage, KEY) ?? [];
draw();
