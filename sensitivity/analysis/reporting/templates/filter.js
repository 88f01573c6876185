for (const choice of document.querySelectorAll("select[data-gallery]")) {
  choice.addEventListener("change", () => {
    const all = [...document.querySelectorAll(`select[data-gallery="${choice.dataset.gallery}"]`)];
    for (const card of document.getElementById(choice.dataset.gallery).children)
      card.hidden = all.some(one => one.value !== "" && card.dataset[one.dataset.by] !== one.value);
  });
}
