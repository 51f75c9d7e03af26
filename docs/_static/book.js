// A link into something folded opens it.
"use strict";

function openAround(id) {
  const target = id && document.getElementById(decodeURIComponent(id));
  let fold = target && target.closest("details");
  if (!fold) return;
  for (; fold; fold = fold.parentElement.closest("details")) fold.open = true;
  target.scrollIntoView();
}

window.addEventListener("hashchange", () => openAround(location.hash.slice(1)));
document.addEventListener("DOMContentLoaded", () => openAround(location.hash.slice(1)));
