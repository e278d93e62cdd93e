"""The page: its files, and what a person does with it in a real browser."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from latentrt import Pipeline
from latentrt.serve.door.access import allow
from latentrt.serve.door.keys import keys_of_environment
from latentrt.serve.page_files import PAGE_FILES, PAGE_PATHS
from tests.parity_pair import photo
from tests.serve.chromium import CTRL, SHIFT, Browser, Page, find_chromium
from tests.serve.live import Live, live, open_demo

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "serve" / "page"
PROMPT = "a red circle on a blue background"
KEY = "0123456789abcdef-secret"
DONE = "document.querySelector('#stage').dataset.state === 'done' && !document.querySelector('#draw').hidden"
Open = Callable[..., AbstractContextManager[Page]]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        opened.load_control(ROOT / "demo" / "controls" / "edges")
        yield opened


@pytest.fixture(scope="module")
def at(pipe: Pipeline) -> Iterator[Live]:
    with live(pipe) as made:
        yield made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    made = Browser(program, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@contextmanager
def _opened(browser: Browser, url: str, *, errors: str = "", **options: Any) -> Iterator[Page]:
    with browser.page(url, **options) as page:
        page.until("document.querySelector('#draw') && !document.querySelector('#draw').disabled")
        yield page
        assert page.evaluate("reports") == [], "the content security policy was violated"
        assert [one for one in page.errors if not (errors and re.search(errors, one))] == []


@pytest.fixture
def opened(browser: Browser, at: Live) -> Open:
    return partial(_opened, browser, at.url)


# ── files ──────────────────────────────────────────────────────────────────────────────────────────


def test_scripts_ask_for_what_the_page_has() -> None:
    html = (FOLDER / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    asked = {
        name for file in FOLDER.glob("*.js") for name in re.findall(r'\bthe\("([^"]+)"\)', file.read_text())
    }
    assert len(asked) > 40
    assert asked <= set(ids)
    assert set(re.findall(r'\b(?:for|aria-labelledby)="([^"]+)"', html)) <= set(ids)
    modules = {
        name for file in FOLDER.glob("*.js") for name in re.findall(r'from "\./([^"]+)"', file.read_text())
    }
    assert modules | {"page.js"} == {file.name for file in FOLDER.glob("*.js")}, "nothing is left over"


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, file.name
        assert "innerHTML" not in text, file.name
    html = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script\b[^>]*>(.*?)</script>", html, re.DOTALL) == [""]
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=", html)


def test_files_are_served_with_their_types(at: Live) -> None:
    assert {"/", "/static/style.css", "/static/page.js", "/static/icon.svg"} <= PAGE_PATHS
    assert len(PAGE_FILES) == len(list(FOLDER.iterdir()))
    kinds = {"": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path, file in PAGE_FILES.items():
        answer = at.client.get(path)
        assert answer.status_code == 200
        assert answer.content == file.content
        assert answer.headers["content-type"].partition(";")[0] == kinds[path.rpartition(".")[2].strip("/")]
        assert answer.headers["cache-control"] == "no-cache"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        again = at.client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        head = at.client.head(path)
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(file.content)))


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/index.html",
        "/static/../page_files.py",
        "/static/%2e%2e/page_files.py",
        "/index.html",
    ],
)
def test_there_are_no_other_files(at: Live, path: str) -> None:
    with httpx.Client() as client:
        request = client.build_request("GET", at.url)
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = client.send(request)
    assert answer.status_code == 404
    assert answer.json()["error"]["fix"]


def test_the_page_needs_no_key_and_its_server_does(pipe: Pipeline) -> None:
    with live(pipe, access=allow(keys=keys_of_environment("K", {"K": KEY})), start=False) as closed:
        assert {closed.client.get(path).status_code for path in PAGE_PATHS} == {200}
        assert closed.client.get("/v1/capabilities").status_code == 401
        assert closed.client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_the_schema_says_what_goes_with_what(at: Live) -> None:
    schema = at.client.get("/v1/capabilities").json()["models"]["demo"]["schema"]
    assert schema["dependentRequired"]["padding_mask_crop"] == ["image", "mask_image"]
    assert schema["dependentRequired"]["strength"] == ["image"]
    assert set(schema["dependentRequired"]) <= set(schema["properties"])
    assert "denoising_start" not in schema["properties"], "no field takes latents"
    refused = at.client.post("/v1/jobs", json={"prompt": PROMPT, "denoising_start": 0.5})
    assert refused.json()["error"]["found"] == "the field denoising_start"
    control = schema["properties"]["controls"]["items"]["properties"]
    assert "canny" in control["preparation"]["enum"]
    assert control["mode"]["enum"] == ["balanced", "prompt", "control", "guess"]


# ── in a browser ─────────────────────────────────────────────────────────────────────────────────────


def pixels_on(page: Page, selector: str = "#pictures img") -> np.ndarray:
    """What the file that an image shows decodes to."""
    text = page.evaluate(
        f"""(async () => {{
          const image = document.querySelector('{selector}');
          await image.decode();
          const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
          canvas.getContext('2d').drawImage(image, 0, 0);
          const bytes = new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer());
          return btoa(String.fromCharCode(...bytes));
        }})()"""
    )
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def set_field(page: Page, name: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const input = document.querySelector('[name={name}]'); input.value = '{value}';"
        "input.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def choose(page: Page, name: str, value: str) -> None:
    page.evaluate(f"document.querySelector('#{name}').value = '{value}'")
    page.evaluate(f"document.querySelector('#{name}').dispatchEvent(new Event('change'))")


def draw(page: Page, prompt: str = PROMPT, **fields: Any) -> None:
    page.evaluate(f"document.querySelector('#prompt').value = {prompt!r}")
    for name, value in fields.items():
        set_field(page, name, str(value))
    page.click("#draw")


def saved(tmp_path: Path, width: int = 64, height: int = 64) -> Path:
    file = tmp_path / "start.png"
    Image.fromarray(np.asarray(photo(width, height))).save(file)
    return file


def test_a_picture_is_drawn_and_kept(opened: Open, pipe: Pipeline) -> None:
    with opened() as page:
        assert page.evaluate("document.querySelector('#stage').dataset.state") == "empty"
        assert page.evaluate("document.activeElement.id") == "prompt"
        assert page.evaluate("document.querySelectorAll('#example-list button').length") == 3
        page.evaluate(
            """(() => {
              window.seen = new Set(); window.states = new Set(); window.shares = [];
              new MutationObserver(() => {
                const image = document.querySelector('#pictures img');
                if (image?.src.startsWith('data:')) seen.add(image.src);
                states.add(document.querySelector('#stage').dataset.state);
                shares.push(document.querySelector('#progress').value);
              }).observe(document.querySelector('#stage'),
                         {attributes: true, subtree: true, childList: true});
            })()"""
        )
        page.type(PROMPT)
        set_field(page, "num_inference_steps", "80")
        set_field(page, "seed", "18446744073709551615")  # more digits than a number of the browser has
        page.press("Enter", CTRL)
        page.until(DONE)
        assert page.evaluate("seen.size") >= 2, "the preview changes"
        assert {"waiting", "drawing", "done"} <= set(page.evaluate("[...states]"))
        assert page.evaluate("Math.max(...shares)") == 1
        wanted = pipe(PROMPT, num_inference_steps=80, seed=2**64 - 1).images[0]
        np.testing.assert_array_equal(pixels_on(page), np.asarray(wanted))
        facts = page.evaluate("document.querySelector('#facts').textContent")
        assert "seed 18446744073709551615" in facts
        assert "80 steps" in facts
        assert page.evaluate("document.querySelector('#said').textContent") == "Done."
        name = page.evaluate("document.querySelector('#download').download")
        assert name == "a-red-circle-on-a-blue-background-18446744073709551615.png"

        draw(page, "a small green heart on a pink background", seed=3)
        page.until(f"{DONE} && document.querySelectorAll('#shelf li').length === 2")
        page.go()
        page.until("document.querySelectorAll('#shelf li').length === 2")
        page.until(DONE)
        assert page.evaluate("document.querySelector('#title').textContent").startswith("a small green heart")


def test_parameters_come_back_from_the_history(opened: Open) -> None:
    with opened() as page:
        page.evaluate("document.querySelector('#avoid').open = true")
        page.evaluate("document.querySelector('#negative').value = 'a square'")
        draw(
            page,
            num_inference_steps=4,
            guidance_scale=2.5,
            sampler="euler_a",
            guidance_rescale=0.25,
            guidance_interval="0, 0.5",
        )
        page.until(DONE)
        first = pixels_on(page)
        page.click("#reset")
        page.evaluate("document.querySelector('#negative').value = ''")
        draw(page, "a white ring", num_inference_steps=2)
        page.until(f"{DONE} && document.querySelectorAll('#shelf li').length === 2")
        page.click("#shelf li:nth-child(2) button")
        page.click("#use-parameters")
        assert page.evaluate("document.querySelector('#prompt').value") == PROMPT
        assert page.evaluate("document.querySelector('[name=guidance_scale]').value") == "2.5"
        page.click("#draw")
        page.until(f"{DONE} && document.querySelectorAll('#shelf li').length === 3")
        np.testing.assert_array_equal(pixels_on(page), first)
        sent = page.sent()
        assert (sent["negative_prompt"], sent["sampler"]) == ("a square", "euler_a")
        assert (sent["guidance_rescale"], sent["num_inference_steps"]) == (0.25, 4)
        assert (sent["guidance_scale"], sent["guidance_interval"]) == (2.5, [0, 0.5])

        page.click("#remove")
        page.until("document.querySelectorAll('#shelf li').length === 2")
        page.click("#empty-history")
        page.until("document.querySelector('#sure').open")
        page.click("#sure [value=no]")
        assert page.evaluate("document.querySelectorAll('#shelf li').length") == 2
        page.click("#empty-history")
        page.click("#sure [value=yes]")
        page.until("document.querySelector('#said').textContent === 'The history is empty.'")
        assert page.evaluate("document.querySelector('#stage').dataset.state") == "empty"
        page.go()
        page.until("!document.querySelector('#draw').disabled")
        assert page.evaluate("document.querySelectorAll('#shelf li').length") == 0


def test_cancel_ends_the_job_and_another_can_follow(opened: Open, at: Live) -> None:
    with opened() as page:
        draw(page, num_inference_steps=150, num_images_per_prompt=4)
        page.until("document.querySelector('#stage').dataset.state === 'drawing'")
        assert page.evaluate("document.activeElement.id") == "cancel"
        assert page.evaluate("document.querySelector('#history').inert")
        page.press("Escape")
        page.until("document.querySelector('#stage').dataset.state === 'empty'")
        newest = at.client.get("/v1/jobs?limit=1").json()["jobs"][0]
        assert (newest["status"], newest["cancel_reason"]) == ("cancelled", "request")
        assert page.evaluate("document.querySelector('#said').textContent") == "Cancelled."
        assert page.evaluate("document.activeElement.id") == "draw"
        draw(page, num_inference_steps=3, num_images_per_prompt=1)
        page.until(DONE)


def test_several_pictures_at_once(opened: Open) -> None:
    with opened() as page:
        draw(page, num_inference_steps=3, num_images_per_prompt=3, seed=5)
        page.until(DONE)
        assert page.evaluate("document.querySelectorAll('#pictures .tile').length") == 3
        page.click("#pictures .tile:nth-child(2)")
        assert "seed 6" in page.evaluate("document.querySelector('#facts').textContent")
        assert page.evaluate("document.querySelectorAll('#pictures [aria-pressed=true]').length") == 1
        page.click("#use-seed")
        assert page.evaluate("document.querySelector('[name=seed]').value") == "6"


def test_a_page_that_is_loaded_again_finds_its_job(opened: Open) -> None:
    with opened() as page:
        draw(page, num_inference_steps=100, num_images_per_prompt=2, seed=1)
        page.until("document.querySelector('#stage').dataset.state === 'drawing'")
        page.go()
        page.until("document.querySelector('#stage').dataset.state === 'drawing'")
        page.until(DONE)
        assert page.evaluate("document.querySelectorAll('#shelf li').length") == 2


def test_a_painted_mask_is_sent(opened: Open, tmp_path: Path, pipe: Pipeline) -> None:
    file = saved(tmp_path)
    with opened() as page:
        page.choose("#file", file)
        page.until("document.querySelector('#ground').naturalWidth === 64")
        page.evaluate(
            "document.querySelector('#easel').scrollIntoView({block: 'center', behavior: 'instant'})"
        )
        left, top, width, height = page.box("#mask")
        middle = top + height / 2
        page.drag([(left + width * share, middle) for share in (0.2, 0.4, 0.6, 0.8)])
        draw(page, num_inference_steps=4, seed=2, strength=0.9)
        page.until(DONE)
        sent = page.sent()
        assert base64.b64decode(sent["image"]) == file.read_bytes()
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(sent["mask_image"]))).convert("L"))
        assert mask.shape == (64, 64)
        assert mask[32, 13:51].min() == 255, "along the stroke"
        assert mask[:24].max() == mask[40:].max() == 0, "far from it"
        fields: dict[str, Any] = {"num_inference_steps": 4, "seed": 2, "strength": 0.9}
        start, painted = Image.open(file), Image.fromarray(mask)
        wanted = pipe(PROMPT, image=start, mask_image=painted, **fields).images[0]
        np.testing.assert_array_equal(pixels_on(page), np.asarray(wanted))

        page.click("#erase")
        page.drag([(left + width * share, page.box("#mask")[1] + height / 2) for share in (0.1, 0.5, 0.9)])
        page.click("#undo")
        page.click("#undo")
        assert page.evaluate("document.querySelector('#undo').disabled")
        page.evaluate("document.querySelector('#mask').focus()")
        page.click("#erase")
        page.evaluate("document.querySelector('#mask').focus()")
        for key in ("ArrowRight", "ArrowDown", " "):
            page.press(key, SHIFT if key != " " else 0)
        page.click("#draw")
        page.until(f"{DONE} && document.querySelectorAll('#shelf li').length === 2")
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(page.sent()["mask_image"]))).convert("L"))
        assert mask[32, 32] == 255
        assert mask[0].max() == 0
        page.click("#drop-picture")
        page.click("#draw")
        page.until(f"{DONE} && document.querySelectorAll('#shelf li').length === 3")
        assert not {"image", "mask_image", "strength"} & set(page.sent())


def test_a_mask_lies_on_a_turned_photo_as_it_is_seen(opened: Open, tmp_path: Path, pipe: Pipeline) -> None:
    """A camera's photo that is stored on its side (EXIF 6): shown upright, masked upright, drawn upright."""
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient = np.add.outer(np.arange(64), np.arange(96)).astype(np.uint8)
    Image.fromarray(gradient).convert("RGB").save(file, exif=exif, quality=95)
    with opened() as page:
        page.choose("#file", file)
        page.until("document.querySelector('#ground').naturalWidth === 64")
        page.evaluate(
            "document.querySelector('#easel').scrollIntoView({block: 'center', behavior: 'instant'})"
        )
        left, top, width, height = page.box("#mask")
        assert width < height, "64 x 96"
        page.drag([(left + width * share, top + height * 0.25) for share in (0.2, 0.4, 0.6, 0.8)])
        draw(page, num_inference_steps=4, seed=2, strength=0.9)
        page.until(DONE)
        sent = page.sent()
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(sent["mask_image"]))).convert("L"))
        assert mask.shape == (96, 64)
        assert mask[24, 20:44].min() == 255, "along the stroke, a quarter below the top"
        assert mask[48:].max() == 0
        fields: dict[str, Any] = {"num_inference_steps": 4, "seed": 2, "strength": 0.9}
        wanted = pipe(PROMPT, image=file, mask_image=Image.fromarray(mask), **fields).images[0]
        np.testing.assert_array_equal(pixels_on(page), np.asarray(wanted))


def test_a_picture_tells_how_it_was_made(opened: Open, tmp_path: Path, pipe: Pipeline) -> None:
    file = tmp_path / "made.png"
    made = pipe(PROMPT, num_inference_steps=5, seed=2**60 + 1, sampler="heun", loras=[("striped", 0.5)])
    made.save(file)
    with opened() as page:
        page.choose("#file", file)
        page.until("!document.querySelector('#tells').hidden")
        page.click("#use-told")
        page.click("#drop-picture")
        page.click("#draw")
        page.until(DONE)
        np.testing.assert_array_equal(pixels_on(page), np.asarray(made.images[0]))
        assert page.sent()["loras"] == [{"name": "striped", "strength": 0.5}]


def test_adapters_and_controls_are_chosen(opened: Open, tmp_path: Path, pipe: Pipeline) -> None:
    file = saved(tmp_path, 128, 128)
    with opened(errors="") as page:
        choose(page, "lora-names", "striped")
        choose(page, "control-names", "edges")
        draw(page, num_inference_steps=3, seed=4)
        page.until("document.querySelector('#stage').dataset.state === 'error'")
        assert (
            page.evaluate("document.querySelector('#found').textContent")
            == "The control edges has no picture"
        )
        page.choose("#control-list input[type=file]", file)
        set_field(page, "preparation", "canny")
        page.click("#again")
        page.until(DONE)
        control = {"model": "edges", "image": Image.open(file), "preparation": "canny"}
        from latentrt import Control

        wanted = pipe(
            PROMPT, num_inference_steps=3, seed=4, loras=["striped"], controls=[Control(**control)]
        ).images[0]
        np.testing.assert_array_equal(pixels_on(page), np.asarray(wanted))


def test_errors_say_what_to_do(opened: Open, tmp_path: Path) -> None:
    with opened(errors="network: .*413") as page:
        draw(page, width=4096, height=4096)
        page.until("document.querySelector('#stage').dataset.state === 'error'")
        words = page.evaluate("document.querySelector('#failure').innerText")
        assert "16777216 pixels a picture" in words
        assert "at most 4194304" in words
        assert "Ask for fewer or smaller pictures" in words
        assert page.evaluate("document.querySelector('#failure').role") == "alert"
        for name in ("width", "height"):
            set_field(page, name, "")
        set_field(page, "num_inference_steps", "3")
        page.click("#again")
        page.until(DONE)
        odd = tmp_path / "odd.png"
        odd.write_bytes(b"no picture")
        page.choose("#file", odd)
        page.until("document.querySelector('#stage').dataset.state === 'error'")
        assert "cannot read odd.png" in page.evaluate("document.querySelector('#found').textContent")
        page.evaluate("document.querySelector('#more').open = false")
        set_field(page, "clip_skip", "99")
        page.click("#draw")
        assert page.evaluate("document.querySelector('#more').open"), "what is wrong is shown"
        assert page.evaluate("document.activeElement.name") == "clip_skip"


def test_a_server_that_is_gone(browser: Browser, pipe: Pipeline) -> None:
    with browser.page("about:blank") as page:
        with live(pipe) as going:
            page.go(going.url)
            page.until("document.querySelector('#draw') && !document.querySelector('#draw').disabled")
        page.click("#draw")
        page.until("document.querySelector('#stage').dataset.state === 'error'")
        assert page.evaluate("document.querySelector('#found').textContent") == "The server does not answer"


def test_a_key_is_asked_for(browser: Browser, pipe: Pipeline) -> None:
    with (
        live(pipe, access=allow(keys=keys_of_environment("K", {"K": KEY}))) as closed,
        browser.page(closed.url) as page,
    ):
        page.until("document.querySelector('#lock').open")
        page.type("wrong-key-of-the-right-length")
        page.press("Enter")
        page.until("document.querySelector('#lock-text').textContent.includes('not known here')")
        page.until("document.querySelector('#lock').open && document.querySelector('#key').value === ''")
        page.type(KEY)
        page.press("Enter")
        page.until("!document.querySelector('#draw').disabled")
        draw(page, num_inference_steps=3)
        page.until(DONE)
        page.go()
        page.until("!document.querySelector('#draw').disabled")
        assert not page.evaluate("document.querySelector('#lock').open"), "it is kept for the session"
        assert page.evaluate("reports") == []
        assert {one.partition(":")[0] for one in page.errors} <= {"network"}
        page.evaluate("sessionStorage.clear()")
        page.go()
        page.until("document.querySelector('#lock').open")
        page.press("Escape")
        page.until("document.querySelector('#stage').dataset.state === 'error'")
        page.click("#again")
        page.until("document.querySelector('#lock').open")


def test_everything_can_be_reached_and_has_a_name(opened: Open) -> None:
    with opened() as page:
        page.type(PROMPT)
        set_field(page, "num_inference_steps", "3")
        page.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Avoid something"
        page.press("Tab")
        assert page.evaluate("document.activeElement.id") == "draw"
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) != "none", "the focus is seen"
        page.press("Enter")
        page.until(DONE)
        assert page.evaluate("document.activeElement.id") == "draw"
        reached: list[str] = []
        for _ in range(80):
            page.press("Tab")
            name = page.evaluate("document.activeElement.name || document.activeElement.id || ''")
            if name == "prompt" or page.evaluate("document.activeElement === document.body"):
                break
            reached.append(name)
        assert {"download", "use-parameters", "sampler", "seed", "file", "lora-names", "reset"} <= set(
            reached
        )
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "textbox", "combobox", "slider", "spinbutton", "checkbox", "link", "image", "img"}
        bare = [
            node
            for node in nodes
            if not node["ignored"]
            and node["role"]["value"] in roles
            and not node.get("name", {}).get("value")
        ]
        assert bare == []


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_no_screen_is_scrolled_sideways(opened: Open, tmp_path: Path, width: int) -> None:
    fits = f"document.documentElement.scrollWidth <= {width}"
    with opened(width=width, height=740) as page:
        assert page.evaluate(fits)
        page.choose("#file", saved(tmp_path))
        page.until("document.querySelector('#ground').naturalWidth === 64")
        choose(page, "lora-names", "striped")
        choose(page, "control-names", "edges")
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert page.evaluate(fits)
        page.click("#control-list button")
        draw(page, "a red circle " * 20, num_inference_steps=40, num_images_per_prompt=3)
        page.until("document.querySelector('#stage').dataset.state === 'drawing'")
        assert page.evaluate(fits)
        page.until(DONE)
        assert page.evaluate(fits)
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('button, select, a')]"
            ".filter((one) => one.offsetParent).map((one) => one.offsetHeight))"
        )
        assert smallest >= 32, "a finger hits it"


def test_the_scheme_follows_the_system(opened: Open) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    found = []
    for scheme in ("light", "dark"):
        with opened(prefers_color_scheme=scheme) as page:
            found.append([int(part) for part in re.findall(r"\d+", page.evaluate(ground))])
    assert min(found[0]) > 200
    assert max(found[1]) < 60
    with opened(prefers_reduced_motion="reduce") as page:
        draw(page, num_inference_steps=60)
        assert page.evaluate("document.getAnimations().length") == 0
        page.until(DONE)
