for (const choice of document.querySelectorAll("select[data-gallery]")) {
  choice.addEventListener("change", () => {
    for (const card of document.getElementById(choice.dataset.gallery).children)
      card.hidden = choice.value !== "" && card.dataset.kind !== choice.value;
  });
}
