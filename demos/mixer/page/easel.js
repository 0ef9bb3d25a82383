// The picture that chains start from, and what is painted on it.
import { button, find, loaded, make } from "./base.js";
import { square } from "./files.js";
import { state } from "./state.js";

const SIDE = 256; // of the easel; the server scales down
const paint = make("canvas", { width: SIDE, height: SIDE }); // what is painted
const ink = paint.getContext("2d", { willReadFrequently: true });
const brush = { x: SIDE / 2, y: SIDE / 2, shown: false };
let drawn = null; // the picture
let changed = () => {};

const easel = make("canvas", {
    id: "easel", width: SIDE, height: SIDE, tabindex: 0, role: "application",
    "aria-label": "Picture to start from. Arrow keys move the brush, Space paints, Backspace erases.",
});
const size = make("input", { type: "range", min: 1, max: 8, value: 3, "aria-label": "Brush size" });
const amount = make("input", {
    type: "range", id: "level", min: 0.2, max: 3, step: 0.1, value: 0.8, "aria-describedby": "level-help", oninput: () => tell(),
});
const file = make("input", { type: "file", id: "start-file", accept: "image/*", onchange: async () => {
    const [chosen] = file.files;
    file.value = "";
    if (chosen) await upload(chosen);
} });
const line = make("p", { role: "status", id: "start-says" }, "Chains start from noise.");

export const upload = async (chosen) => {
    try {
        await begin(await square(chosen), chosen.name);
        return true;
    } catch {
        line.textContent = `${chosen.name} is no picture that can be read; give a PNG, JPEG or WebP.`;
        return false;
    }
};

/** Draws the panel. `noise` is called to go back to noise, `example` for a picture of the data, `change` with
    {picture, mask, level, name} or null. */
export const easelPanel = (root, { noise, example, change }) => {
    changed = change;
    root.replaceChildren(
        make("div", { class: "start-panel" }, easel, make(
            "div", { class: "start-controls" }, line,
            make("label", { class: "file" }, "A picture of yours ", file),
            make("div", { class: "line" }, button("A picture of the data", example, { id: "example" }), button("Noise again", noise, { id: "noise" })),
            make("div", { class: "line" }, make("label", {}, "Brush ", size), button("Clear paint", unpaint, { id: "unpaint" })),
            make("div", { class: "field" }, make("label", { for: "level" }, "Change"), make("span", { class: "hint" }, "a little"), amount, make("span", { class: "hint" }, "a lot")),
            make("p", { class: "hint", id: "level-help" }, "Paint over the part that may change; the rest stays as it is. Without paint, all of it may change, as much as said here."),
        )),
    );
    draw();
};

export const begin = async (address, name) => {
    drawn = await loaded(address);
    line.textContent = `Chains start from ${name}.`;
    ink.clearRect(0, 0, SIDE, SIDE);
    tell(name);
};

/** Shows no picture: chains start from one that is none of its own, or from noise. */
export const clear = (name = "noise") => {
    drawn = null;
    line.textContent = `Chains start from ${name}.`;
    draw();
};

const unpaint = () => {
    ink.clearRect(0, 0, SIDE, SIDE);
    tell();
};

const tell = (name = state.start?.name) => {
    draw();
    if (!drawn) return;
    const painted = ink.getImageData(0, 0, SIDE, SIDE).data.some((value) => value);
    changed({ pictures: [drawn.src], mask: painted ? paint.toDataURL("image/png") : "", level: Number(amount.value), name });
};

const draw = () => {
    const pen = easel.getContext("2d");
    pen.clearRect(0, 0, SIDE, SIDE);
    pen.imageSmoothingEnabled = false;
    if (drawn) pen.drawImage(drawn, 0, 0, SIDE, SIDE);
    pen.globalAlpha = 0.5;
    if (drawn) pen.drawImage(paint, 0, 0);
    pen.globalAlpha = 1;
    if (!brush.shown || !drawn) return;
    for (const [colour, width] of [["#fff", 3], ["#000", 1]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = width;
        pen.beginPath();
        pen.arc(brush.x, brush.y, size.value * 6, 0, 7);
        pen.stroke();
    }
};

const stroke = (erase) => {
    if (!drawn) return;
    ink.globalCompositeOperation = erase ? "destination-out" : "source-over";
    ink.fillStyle = "#ff2d95";
    ink.beginPath();
    ink.arc(brush.x, brush.y, size.value * 6, 0, 7);
    ink.fill();
    draw();
};

let pressed = false;
const reach = (event) => {
    const box = easel.getBoundingClientRect();
    brush.x = ((event.clientX - box.left) / box.width) * SIDE;
    brush.y = ((event.clientY - box.top) / box.height) * SIDE;
    brush.shown = true;
};
easel.addEventListener("pointerdown", (event) => {
    pressed = true;
    easel.setPointerCapture(event.pointerId);
    reach(event);
    stroke(event.shiftKey);
});
easel.addEventListener("pointermove", (event) => {
    reach(event);
    if (pressed) stroke(event.shiftKey);
    else draw();
});
easel.addEventListener("pointerleave", () => { brush.shown = false; draw(); });
easel.addEventListener("pointerup", () => { pressed = false; tell(); });
easel.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] };
    if (event.key in moves) {
        brush.shown = true;
        brush.x = Math.min(Math.max(brush.x + moves[event.key][0], 0), SIDE);
        brush.y = Math.min(Math.max(brush.y + moves[event.key][1], 0), SIDE);
        draw();
    } else if (event.key === " " || event.key === "Backspace") {
        stroke(event.key === "Backspace");
        tell();
    } else return;
    event.preventDefault();
});
