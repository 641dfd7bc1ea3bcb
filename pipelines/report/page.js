"use strict";

const $ = (id) => document.getElementById(id);
const pictures = JSON.parse($("pictures").textContent);
const gallery = $("gallery");
const cards = [...gallery.children];
const view = $("sample");
let shown = cards; // those that pass the filters, in order
let current = null; // the card that has the focus, or is shown large

// Each picture is held once, however many samples show it.
document.querySelectorAll("[data-picture]").forEach((image) => { image.src = pictures[image.dataset.picture]; });

// Filters

const facts = new Map(cards.map((card) => [card, {
  text: card.textContent.toLowerCase(),
  numbers: JSON.parse(card.dataset.numbers),
}]));

function matches(card) {
  const { text, numbers } = facts.get(card);
  const words = $("search").value.toLowerCase().split(/\s+/);
  if ($("stream").value && $("stream").value !== card.dataset.stream) return false;
  if ($("split").value && $("split").value !== card.dataset.split) return false;
  if (!words.every((word) => text.includes(word))) return false;
  const name = $("number").value;
  if (!name) return true;
  const value = numbers[name];
  const low = $("low").value, high = $("high").value;
  return value !== undefined && (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));
}

function filter() {
  for (const id of ["low", "high"]) $(id).disabled = !$("number").value;
  for (const card of cards) card.hidden = !matches(card);
  shown = cards.filter((card) => !card.hidden);
  $("shown").textContent = `${shown.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")}`;
  $("nothing").hidden = shown.length > 0;
  if (!shown.includes(current)) current = null;
  makeReachable();
}

// One card at a time can be reached with Tab; the arrows move between cards.
function makeReachable() {
  const one = current ?? shown[0];
  for (const card of cards) card.tabIndex = card === one ? 0 : -1;
}

// Moving and showing

function moveTo(card) {
  if (!card) return;
  current = card;
  makeReachable();
  if (view.open) show(card);
  else {
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  }
}

function move(step) {
  moveTo(current ? shown[shown.indexOf(current) + step] : shown[0]);
}

// The nearest card in the row below (1) or above (-1).
function moveRow(direction) {
  if (!current) return move(direction);
  const here = current.getBoundingClientRect();
  const rows = direction > 0 ? shown.slice(shown.indexOf(current) + 1) : shown.slice(0, shown.indexOf(current)).reverse();
  moveTo(rows.find((card) => card.offsetTop !== current.offsetTop && Math.abs(card.getBoundingClientRect().left - here.left) < 2));
}

function show(card) {
  current = card;
  const copy = card.cloneNode(true);
  copy.querySelector(".more").hidden = false;
  $("large").replaceChildren(...copy.childNodes);
  $("position").textContent = `${shown.indexOf(card) + 1} of ${shown.length}`;
  $("previous").disabled = card === shown[0];
  $("next").disabled = card === shown.at(-1);
  if (!view.open) view.showModal();
  view.scrollTop = 0;
}

view.addEventListener("close", () => moveTo(current));
gallery.addEventListener("click", (event) => {
  const card = event.target.closest(".card");
  if (card) show(card);
});
gallery.addEventListener("focusin", (event) => {
  current = event.target.closest(".card");
  makeReachable();
});

// Switches

function toggle(name) {
  const on = document.documentElement.classList.toggle(`show-${name}`);
  $(name).setAttribute("aria-pressed", on);
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { $("theme").textContent = isDark() ? "Light" : "Dark"; };

function switchTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
}

function unfold(button) {
  const open = button.getAttribute("aria-expanded") !== "true";
  button.setAttribute("aria-expanded", open);
  button.closest("tbody").querySelectorAll(".part").forEach((row) => { row.hidden = !open; });
}

function reset() {
  document.querySelector(".toolbar").reset();
  filter();
}

// Keys

const keys = {
  j: () => move(1),
  k: () => move(-1),
  ArrowRight: () => move(1),
  ArrowLeft: () => move(-1),
  ArrowDown: () => moveRow(1),
  ArrowUp: () => moveRow(-1),
  Enter: () => current && show(current),
  "/": () => $("search").focus(),
  m: () => toggle("mask"),
  w: () => toggle("weights"),
  t: switchTheme,
  "?": () => $("help").showModal(),
};
const inDialog = new Set(["j", "k", "ArrowRight", "ArrowLeft", "m", "w", "t"]);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) {
    if (event.key === "Escape" && event.target === $("search")) moveTo(current ?? shown[0]);
    return;
  }
  const target = event.target;
  const isTyping = target.matches("input, select, textarea");
  const isArrow = event.key.startsWith("Arrow");
  if (isTyping || $("help").open || (view.open && !inDialog.has(event.key))) return;
  if (event.key === "Enter" && !target.matches(".card")) return;
  // Arrows scroll the page as usual until a sample has the focus, and what scrolls by itself.
  if (isArrow && !view.open && !target.matches(".card")) return;
  if (isArrow && target.matches("pre")) return;
  event.preventDefault();
  keys[event.key]();
});

document.querySelectorAll(".fold").forEach((button) => button.addEventListener("click", () => unfold(button)));
document.querySelectorAll(".close").forEach((b) => b.addEventListener("click", () => b.closest("dialog").close()));
document.querySelectorAll("dialog").forEach((dialog) => dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
}));
document.querySelector(".toolbar").addEventListener("input", filter);
document.querySelector(".toolbar").addEventListener("submit", (event) => event.preventDefault());
$("mask").addEventListener("click", () => toggle("mask"));
$("weights").addEventListener("click", () => toggle("weights"));
$("theme").addEventListener("click", switchTheme);
$("help-button").addEventListener("click", () => $("help").showModal());
$("previous").addEventListener("click", () => move(-1));
$("next").addEventListener("click", () => move(1));
$("reset").addEventListener("click", reset);
prefersDark.addEventListener("change", nameTheme);
nameTheme();
filter();
