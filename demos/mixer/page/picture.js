// The pictures of all chains, as one image: which of them is chosen, and which still miss something.
import { find, loaded, make, says } from "./base.js";
import { state } from "./state.js";

const GAP = 1; // pixels between pictures
const frame = find("picture");
let image = null;
let marks = null;
let chosenBy = () => {};

export const onChoose = (listener) => { chosenBy = listener; };

const places = () => {
    const { count } = state.shown;
    if (!image?.naturalWidth || !count) return null;
    const columns = Math.ceil(Math.sqrt(count));
    const rows = Math.ceil(count / columns);
    return { columns, rows, width: (image.naturalWidth + GAP) / columns - GAP, height: (image.naturalHeight + GAP) / rows - GAP };
};

/** Shows a picture: {picture, count, alt, misses, recipe}. What is not given stays. */
export const show = (message) => {
    if (!image) {
        image = make("img", { class: "pixels", alt: "", onload: mark });
        marks = make("div", { class: "marks" });
        frame.replaceChildren(image, marks);
    }
    if (message.picture && image.getAttribute("src") !== message.picture) image.src = message.picture;
    if (message.alt && image.alt !== message.alt) image.alt = message.alt;
    state.shown = { ...state.shown, ...message };
    if (state.chosen >= state.shown.count) choose(-1);
    if (image.complete) mark();
};

export const blank = (text) => {
    if (!image) frame.replaceChildren(make("p", { class: "blank" }, text));
};

const mark = () => {
    const at = places();
    if (!at) return;
    const [across, down] = [100 / (at.columns * (at.width + GAP) - GAP), 100 / (at.rows * (at.height + GAP) - GAP)];
    const cell = (index, name, title) => make("span", {
        class: name, title,
        style: `left:${(index % at.columns) * (at.width + GAP) * across}%;top:${Math.floor(index / at.columns) * (at.height + GAP) * down}%;` +
            `width:${at.width * across}%;height:${at.height * down}%`,
    });
    const missed = (state.shown.misses ?? []).map((index) => cell(index, "missed", "still misses something that is asked for"));
    marks.replaceChildren(...missed, ...(state.chosen >= 0 ? [cell(state.chosen, "ring")] : []));
};

/** Chooses a picture, or none with -1. */
export const choose = (index) => {
    state.chosen = index;
    mark();
    if (index >= 0) {
        const missing = state.shown.misses?.includes(index) ? "; it still misses something" : "";
        says(`Picture ${index + 1} of ${state.shown.count} is chosen${missing}.`);
    }
    chosenBy(index);
};

/** One picture as a data URI of its own size, or all of them; of none, null. */
export const crop = (index) => {
    const at = places();
    if (!at || index < 0 || index >= state.shown.count) return null;
    const canvas = make("canvas", { width: at.width, height: at.height });
    const pen = canvas.getContext("2d");
    const [x, y] = [(index % at.columns) * (at.width + GAP), Math.floor(index / at.columns) * (at.height + GAP)];
    pen.drawImage(image, x, y, at.width, at.height, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/png");
};
export const crops = () => Array.from({ length: state.shown.count }, (_, index) => crop(index));

/** One picture enlarged in steps of two, so that edges stay clean, to about `side` pixels. */
export const large = async (index, side = 512) => {
    let source = await loaded(crop(index));
    let size = source.width;
    while (size < side) {
        const canvas = make("canvas", { width: size * 2, height: (size * 2 * source.height) / source.width });
        const pen = canvas.getContext("2d");
        pen.imageSmoothingQuality = "high";
        pen.drawImage(source, 0, 0, canvas.width, canvas.height);
        source = canvas;
        size *= 2;
    }
    return source.toDataURL ? source.toDataURL("image/png") : source.src;
};

frame.addEventListener("click", (event) => {
    const at = places();
    if (!at) return;
    const box = image.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * at.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * at.rows);
    const index = row * at.columns + column;
    if (column >= 0 && column < at.columns && index >= 0 && index < state.shown.count) choose(index);
});
frame.addEventListener("keydown", (event) => {
    const at = places();
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -at?.columns, ArrowDown: at?.columns }[event.key];
    if (!at || !by) return;
    event.preventDefault();
    const next = state.chosen < 0 ? 0 : state.chosen + by;
    if (next >= 0 && next < state.shown.count) choose(next);
});
