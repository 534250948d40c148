"""The page of the server in a real browser, against a server that gives planned answers."""

import base64
import io
import json
import shutil
import time
from urllib.parse import urlsplit

import pytest
from PIL import Image
from serving.browser import SHIFT, VARIABLE, Browser, find_browser
from serving.fake_server import Answer, FakeServer

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.types import Box, GroundedObject

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no Chromium on the PATH; set {VARIABLE} to the path of one"
)
ORANGE = (0xD5, 0x5E, 0x00)  # of the first object
DOG = "See <ref>the dog</ref><box>(125,125),(624,624)</box>!"
DOG_PX = {"label": "the dog", "image": 0, "boxes": [[100, 50, 500, 250]]}
IS_DONE = "document.querySelector('.turn:last-child .answer')?.dataset.state === 'done'"
LAST = ".turn:last-child"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    browser = Browser(BROWSER, folder)
    tab = browser.open_page()
    yield tab
    tab.close()
    browser.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def page(tab, server, tmp_path):
    """The opened page; a test fails if it has errors or asks for anything from elsewhere.

    Each server has an address of its own, so each test begins with an empty storage.
    """
    tab.reset(tmp_path)
    tab.open(server.address)
    tab.until("document.getElementById('model-name').textContent")
    yield tab
    assert tab.problems() == []
    local = (server.address, "data:", f"blob:{server.address}")
    assert [address for address in tab.requested() if not address.startswith(local)] == []


def image_file(path, size=(800, 400), **options):
    Image.new("RGB", size, "white").save(path, **options)
    return path


def attach(page, *files):
    count = page.value("document.querySelectorAll('#attached li').length") + len(files)
    page.choose_files("#files", *files)
    page.until(f"document.querySelectorAll('#attached li').length === {count}")


def ask(page, text, state="done"):
    page.type("#question", text)
    page.press("Enter")
    wait_for(page, state)


def wait_for(page, state):
    page.until(f"document.querySelector('{LAST} .answer')?.dataset.state === '{state}'")
    page.until("document.getElementById('send').textContent === 'Send'")


def decoded(url):
    """The bytes of a data URL."""
    return base64.b64decode(url.split(";base64,")[1])


def contents(request):
    """The texts and the number of images of each message."""
    found = []
    for message in request["messages"]:
        content = message["content"]
        if isinstance(content, str):
            found.append((message["role"], content, 0))
            continue
        texts = "".join(item["text"] for item in content if item["type"] == "text")
        images = sum(item["type"] == "image_url" for item in content)
        found.append((message["role"], texts, images))
    return found


@pytest.mark.parametrize("size", [(2000, 40), (40, 2000), (1, 900)])
def test_a_box_on_a_thin_image_is_seen(page, server, tmp_path, size):
    width, height = size
    box = {"label": "a", "image": 0, "boxes": [[width / 4, height / 4, width / 2, height / 2]]}
    server.plan(Answer("<ref>a</ref><box>(250,250),(500,500)</box>", (box,)))
    attach(page, image_file(tmp_path / "thin.png", size))
    page.resize(390, 800)
    ask(page, "What is there?")
    left, top, shown_width, shown_height = page.rectangle(".frame")
    assert 80 <= shown_width <= 390
    assert 80 <= shown_height <= 560
    assert page.rectangle(".frame img") == (left, top, shown_width, shown_height)
    expected = (left + shown_width / 4, top + shown_height / 4, shown_width / 4, shown_height / 4)
    assert page.rectangle(".box") == pytest.approx(expected, abs=1)


def test_question_with_images_is_answered_without_markup(page, server, tmp_path):
    files = [image_file(tmp_path / "a.png"), image_file(tmp_path / "b.jpg", (30, 90))]
    server.plan(Answer(DOG, (DOG_PX,)))
    attach(page, *files)
    ask(page, "Where is the dog?")
    assert page.text(f"{LAST} .answer .text") == "See the dog!"
    assert page.text(f"{LAST} .note").startswith("7 tokens")
    (request,) = server.requests
    assert request["model"] == "qwen_vl_chat"
    assert request["stream"] is True
    assert not {"temperature", "top_p", "max_tokens"} & request.keys()
    assert contents(request) == [("user", "Where is the dog?", 2)]
    urls = [item["image_url"]["url"] for item in request["messages"][0]["content"][:2]]
    assert [decoded(url) for url in urls] == [file.read_bytes() for file in files]
    assert page.value("document.querySelectorAll('#attached li').length") == 0


@pytest.mark.parametrize("width", [400, 1280])
def test_box_is_on_its_pixels_of_a_scaled_image(page, server, tmp_path, width):
    page.resize(width, 900)
    server.plan(Answer(DOG, (DOG_PX,)))
    attach(page, image_file(tmp_path / "a.png"))
    ask(page, "Where is the dog?")
    left, top, image_width, image_height = page.rectangle(f"{LAST} .frame img")
    scale = image_width / 800
    assert scale < 0.95
    assert image_height == pytest.approx(400 * scale, abs=1)
    expected = (left + 100 * scale, top + 50 * scale, left + 500 * scale, top + 250 * scale)
    x, y, box_width, box_height = page.rectangle(f"{LAST} .box")
    assert (x, y, x + box_width, y + box_height) == pytest.approx(expected, abs=0.5)
    screen = page.screenshot()
    middle = (int(expected[0] + expected[2]) // 2, int(expected[1] + expected[3]) // 2)
    columns = [i for i in range(screen.width) if screen.getpixel((i, middle[1])) == ORANGE]
    rows = [i for i in range(screen.height) if screen.getpixel((middle[0], i)) == ORANGE]
    drawn = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert drawn == pytest.approx(expected, abs=1.01)


def test_boxes_are_drawn_without_objects_of_the_server_and_quads_are_outlined(
    page, server, tmp_path
):
    quad = "<ref>sign</ref><quad>(100,100),(300,50),(320,200),(120,250)</quad>"
    server.plan(f"{quad} and <box>(0,0),(999,999)</box>")
    attach(page, image_file(tmp_path / "a.png"), image_file(tmp_path / "b.png", (90, 400)))
    ask(page, "Read the sign.")
    assert page.text(f"{LAST} .answer .text") == "sign and box"
    frame = page.rectangle(f"{LAST} .frame")
    assert page.value(f"document.querySelector('{LAST} .frame img').alt") == "Image 2"
    assert page.rectangle(f"{LAST} .box[data-object='1']") == pytest.approx(frame, abs=0.5)
    points = page.value(f"document.querySelector('{LAST} polygon').getAttribute('points')")
    pairs = [100, 100, 300, 50, 320, 200, 120, 250]
    assert [float(x) * 999 for x in points.split(",") for x in x.split()] == pytest.approx(pairs)


@pytest.mark.parametrize(
    ("text", "given", "name", "rectangle"),
    [
        ("(0.25,0.50)", {"label": None, "boxes": [[200, 200]]}, "point", None),
        ('[{"bbox_2d": ...}]', {"label": "dog", "boxes": [[100, 50, 500, 250]]}, "dog", (400, 200)),
    ],
)
def test_objects_of_an_answer_without_markup_follow_it(
    page, server, tmp_path, text, given, name, rectangle
):
    server.plan(Answer(text, ({**given, "image": 0, "frame": "pixel"},)))
    attach(page, image_file(tmp_path / "a.png"))
    ask(page, "Where?")
    assert page.text(f"{LAST} .answer .text") == f"{text} {name}"
    left, top, image_width, _ = page.rectangle(f"{LAST} .frame img")
    scale = image_width / 800
    x, y, width, height = page.rectangle(f"{LAST} .box")
    if rectangle is None:
        center = (x + width / 2, y + height / 2)
        assert center == pytest.approx((left + 200 * scale, top + 200 * scale), abs=0.5)
        assert width > 10
    else:
        assert (width, height) == pytest.approx([side * scale for side in rectangle], abs=0.5)


def test_objects_name_the_image_of_their_boxes(page, server, tmp_path):
    server.plan(Answer(DOG, (DOG_PX,)), Answer(DOG, (DOG_PX,)), DOG)
    attach(page, image_file(tmp_path / "a.png"))
    ask(page, "Where?")
    attach(page, image_file(tmp_path / "b.png", (600, 900)))
    ask(page, "And in the first?")
    ask(page, "And without objects?")
    alts = page.value("[...document.querySelectorAll('.frame img')].map((image) => image.alt)")
    assert alts == ["Image 1", "Image 1", "Image 2"]
    titles = page.value("[...document.querySelectorAll('.label')].map((label) => label.title)")
    assert titles[1] == "Image 1: (100, 50) to (500, 250) pixels"
    assert titles[2] == "Image 2: (75, 113) to (375, 562) pixels"


def test_label_and_boxes_light_each_other(page, server, tmp_path):
    cat = "<ref>a cat</ref><box>(700,100),(800,200)</box><box>(850,100),(950,200)</box>"
    server.plan(f"{DOG} {cat}")
    attach(page, image_file(tmp_path / "a.png"))
    ask(page, "Where are they?")
    lit = "[...document.querySelectorAll('.lit')].map((node) => node.dataset.object)"
    page.point_at(".label[data-object='1']")
    assert page.value(lit) == ["1", "1", "1"]
    page.point_at(".box[data-object='0']")
    assert page.value(lit) == ["0", "0"]
    page.point_at("h1")
    assert page.value(lit) == []
    colors = page.value(
        "[...document.querySelectorAll('.box')].map((box) => getComputedStyle(box).borderColor)"
    )
    assert len(set(colors)) == 2


def test_page_is_usable_by_keyboard_alone(page, server, tmp_path):
    server.plan(Answer(DOG, (DOG_PX,)), Answer("Again."))
    attach(page, image_file(tmp_path / "a.png"))
    ask(page, "Where is the dog?")

    def tab_to(selector, modifiers=SHIFT):
        for _ in range(20):
            if page.value(f"document.activeElement.matches({selector!r})"):
                return
            page.press("Tab", modifiers)
        raise AssertionError(f"{selector} is not reached")

    tab_to(".box")
    assert page.value("document.querySelectorAll('.lit').length") == 2
    name = page.value("document.activeElement.ariaLabel")
    assert name == "the dog: (100, 50) to (500, 250) pixels"
    tab_to(".label")
    assert page.value("document.querySelectorAll('.lit').length") == 2
    tab_to(".last-only", 0)
    page.press("Enter")
    wait_for(page, "done")
    assert page.text(f"{LAST} .answer .text") == "Again."
    tab_to("#open-settings")
    page.press("Enter")
    page.until("document.querySelector('#settings').open")
    page.press("Escape")
    page.until("!document.querySelector('#settings').open")
    assert page.value("document.activeElement.id") == "open-settings"


def test_markup_stays_hidden_while_it_is_incomplete(page):
    text = f"{DOG} <quad>(1,2),(3,4),(5,6),(7,8)</quad> x < y"
    script = """import("./markup.js").then(({ parse }) => TEXT.map((text) => parse(text, false)
        .map((part) => typeof part === "string" ? part : part.label ?? "").join("")))"""
    prefixes = [text[:end] for end in range(len(text) + 1)]
    shown = page.value(script.replace("TEXT", json.dumps(prefixes)))
    assert all("See the dog!  x < y".startswith(part) for part in shown)
    assert shown[len("See <ref>the d")] == "See the d"
    assert shown[-1] == "See the dog!  x < y"


def test_markup_that_cannot_be_read_stays_text_and_is_shown_on_request(page, server):
    server.plan(f"{DOG} <box>here</box>")
    ask(page, "Where?")
    assert page.text(f"{LAST} .answer .text") == "See the dog! <box>here</box>"
    page.click(f"{LAST} [aria-pressed]")
    assert page.text(f"{LAST} .answer .text") == f"{DOG} <box>here</box>"


def test_boxes_without_an_image_leave_their_labels(page, server):
    server.plan(f"{DOG} <box>(1,2),(3,4)</box>")
    ask(page, "Where?")
    assert page.text(f"{LAST} .answer .text") == "See the dog! box"
    assert page.value("document.querySelectorAll('.label, .box').length") == 0


def test_text_of_others_never_becomes_html(page, server, tmp_path):
    attack = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    server.plan(f"<ref>{attack}</ref><box>(1,1),(9,9)</box>{attack}", Answer(attack, status=400))
    attach(page, image_file(tmp_path / "a<b>.png"))
    ask(page, attack)
    assert page.text(f"{LAST} .answer .text") == attack + attack
    ask(page, attack, "failed")
    assert page.text(f"{LAST} .note") == f"Error 400: {attack}"
    assert page.value("document.querySelectorAll('script').length") == 1
    assert page.value("document.querySelectorAll('[onerror]').length") == 0


def test_conversation_has_turns_and_regenerating_asks_the_last_again(page, server, tmp_path):
    server.plan("One.", "Two.", "Three.", "Three.")
    attach(page, image_file(tmp_path / "a.png"))
    ask(page, "First?")
    ask(page, "Second?")
    first = [("user", "First?", 1), ("assistant", "One.", 0)]
    assert contents(server.requests[1]) == [*first, ("user", "Second?", 0)]
    page.click(f"{LAST} .last-only")
    page.until(f"document.querySelector('{LAST} .answer .text').innerText === 'Three.'")
    wait_for(page, "done")
    assert contents(server.requests[2]) == contents(server.requests[1])
    page.click(f"{LAST} .last-only")
    page.until("document.getElementById('status').innerText.startsWith('The same answer again')")
    assert page.value("document.querySelectorAll('.turn').length") == 2


def test_editing_a_question_replaces_it_and_all_that_follows(page, server, tmp_path):
    server.plan("One.", "Two.", "New.")
    attach(page, image_file(tmp_path / "a.png"))
    ask(page, "First?")
    ask(page, "Second?")
    page.type("#question", "a draft")
    page.click(".turn:first-child .question .quiet")
    assert page.value("document.getElementById('question').value") == "First?"
    page.press("Escape")
    assert page.value("document.getElementById('question').value") == "a draft"
    page.click(".turn:first-child .question .quiet")
    ask(page, "Better?")
    assert contents(server.requests[2]) == [("user", "Better?", 1)]
    assert page.value("document.querySelectorAll('.turn').length") == 1
    assert page.value("document.getElementById('question').value") == "a draft"


def test_stopping_closes_the_connection_and_keeps_the_text(page, server):
    server.plan(Answer("Some words", ending="never"), "Next.")
    page.type("#question", "Tell me.")
    page.press("Enter")
    page.until("document.querySelector('.answer .text').innerText.includes('more more')")
    page.click("#send")
    wait_for(page, "stopped")
    assert server.left.wait(10)
    kept = page.text(f"{LAST} .answer .text")
    assert kept.startswith("Some words more")
    ask(page, "Go on.")
    assert contents(server.requests[1])[1] == ("assistant", kept, 0)


def test_clearing_can_be_undone(page, server):
    server.plan("One.", "Two.")
    ask(page, "First?")
    page.click("#new")
    assert page.value("document.querySelectorAll('.turn').length") == 0
    assert not page.value("document.getElementById('welcome').hidden")
    page.click("#status button")
    ask(page, "Second?")
    assert len(contents(server.requests[1])) == 3


def test_clearing_stops_an_answer_and_undoing_shows_its_boxes(page, server, tmp_path):
    server.plan(Answer(DOG, ending="never"))
    attach(page, image_file(tmp_path / "a.png"))
    page.type("#question", "Where?")
    page.press("Enter")
    page.until("document.querySelector('.box')")
    page.click("#new")
    assert server.left.wait(10)
    page.click("#status button")
    assert page.value("document.querySelectorAll('.box').length") == 1
    assert page.text(f"{LAST} .note") == "Stopped"


def test_settings_are_sent_and_only_the_key_is_forgotten(page, server):
    server.plan("One.", "Two.")
    page.click("#open-settings")
    values = {"temperature": "0.7", "top_p": "0.9", "max_tokens": "12", "key": "secret-1"}
    for name, value in {**values, "system": "Be brief."}.items():
        page.type(f"#settings [name={name}]", value)
    page.value("document.querySelector('#settings [name=model]').value = 'adapter'")
    page.click("#settings .primary")
    page.until("document.getElementById('model-name').textContent === 'adapter'")
    ask(page, "Hello?")
    request = server.requests[0]
    assert request["model"] == "adapter"
    assert [request[name] for name in ("temperature", "top_p", "max_tokens")] == [0.7, 0.9, 12]
    assert contents(request) == [("system", "Be brief.", 0), ("user", "Hello?", 0)]
    assert server.keys[-1] == "Bearer secret-1"
    script = "Array.from(localStorage, (_, i) => localStorage.getItem(localStorage.key(i))).join()"
    assert '"top_p":"0.9"' in page.value(script)
    assert "secret-1" not in page.value(script)
    page.value("sessionStorage.clear()")
    page.open(server.address)
    page.until("document.getElementById('model-name').textContent === 'adapter'")
    ask(page, "Hello?")
    assert server.requests[1]["temperature"] == 0.7
    assert server.keys[-1] is None


def test_after_the_right_key_the_question_is_asked_again(page, server):
    server.key = "right-key-1"
    server.plan("Yes.")
    ask(page, "Hello?", "failed")
    for key, shown in (("", "The server asks for a key."), ("wrong-key", "This key is wrong.")):
        enter_key(page, key)
        page.until(f"document.getElementById('status').textContent.startsWith('{shown}')")
    enter_key(page, server.key)
    wait_for(page, "done")
    assert page.text(f"{LAST} .answer .text") == "Yes."
    assert page.text("#status") == ""
    assert [contents(request) for request in server.requests] == [[("user", "Hello?", 0)]] * 2


def enter_key(page, key):
    page.click("#open-settings")
    page.value("document.querySelector('#settings [name=key]').value = ''")
    page.type("#settings [name=key]", key)
    page.click("#settings .primary")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer("Incorrect API key.", status=401), "Error 401: Incorrect API key. Enter a key"),
        (Answer("The queue is full.", status=429, retry_after=7), "Error 429: The queue is full."),
        (Answer("The server is stopping.", status=503), "Error 503: The server is stopping."),
        (Answer("Some", ending="lost"), "The connection closed within the answer."),
        (Answer("Some", ending="error"), "Error 500: The engine has failed."),
    ],
)
def test_errors_are_shown_and_the_question_can_be_tried_again(page, server, answer, message):
    server.plan(answer, "Better.", "Next.")
    ask(page, "Hello?", "failed")
    shown = page.text(f"{LAST} .note")
    assert shown.startswith(message)
    assert ("Try again in 7 s." in shown) == (answer.status == 429)
    assert page.text(f"{LAST} .last-only") == "Try again"
    page.click(f"{LAST} .last-only")
    wait_for(page, "done")
    assert page.text(f"{LAST} .answer .text") == "Better."
    assert page.text(f"{LAST} .note").startswith("7 tokens")


def test_question_without_an_answer_is_left_out_of_the_conversation(page, server):
    server.plan(Answer("Busy.", status=503), "Yes.")
    ask(page, "First?", "failed")
    ask(page, "Second?")
    assert contents(server.requests[1]) == [("user", "Second?", 0)]


def test_server_that_has_ended_is_named(page, server):
    server.close()
    ask(page, "Hello?", "failed")
    assert page.text(f"{LAST} .note") == "The server cannot be reached. Is it still running?"


def test_saved_row_is_read_as_the_same_conversation(page, server, tmp_path):
    file = image_file(tmp_path / "a.png")
    server.plan(Answer(DOG, (DOG_PX,)), "Yes: ünï😀\n<|im_end|>")
    page.click("#open-settings")
    page.type("#settings [name=system]", "Be brief.")
    page.click("#settings .primary")
    attach(page, file)
    ask(page, "Where is <ref>the dog</ref>?")
    ask(page, 'Is it "brown"?\\')
    page.click("#save")
    deadline = time.monotonic() + 10
    while not (saved := list(tmp_path.glob("chat-*.jsonl"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (row,) = read_rows(str(saved[0]), ReadOptions())
    assert row.id == saved[0].stem
    assert not row.notes
    assert [turn.role for turn in row.turns] == ["system", *("user", "assistant") * 2]
    system, question, answer, second, last = (turn.parts for turn in row.turns)
    assert system == ("Be brief.",)
    assert question[0].source == file.read_bytes()
    assert question[1:] == ("Where is ", GroundedObject(label="the dog"), "?")
    box = Box(x0=125, y0=125, x1=624, y1=624, frame="grid")
    assert answer == ("See ", GroundedObject(label="the dog", boxes=(box,)), "!")
    assert second == ('Is it "brown"?\\',)
    assert last == ("Yes: ünï😀\n<|im_end|>",)


def test_saving_warns_about_text_that_a_row_reads_as_a_tag(page, server):
    server.plan("It is a tag.")
    ask(page, "What does <image> mean?")
    page.click("#save")
    page.until("document.getElementById('status').innerText.includes('<image>, which data=jsonl')")


def test_images_are_pasted_dropped_and_removed(page, server):
    page.value(
        """(async () => {
          const canvas = new OffscreenCanvas(20, 10);
          canvas.getContext("2d");
          const blob = await canvas.convertToBlob();
          const transfer = new DataTransfer();
          for (const name of ["a.png", "b.png"]) transfer.items.add(new File([blob], name));
          const [clipboardData, dataTransfer] = [transfer, transfer];
          document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
          document.dispatchEvent(new DragEvent("drop", { dataTransfer }));
        })()"""
    )
    page.until("document.querySelectorAll('#attached li').length === 4")
    page.click("#attached li:nth-child(2) button")
    assert page.value("document.activeElement.ariaLabel").startswith("Remove image 2")
    server.plan("Three.")
    ask(page, "How many?")
    assert contents(server.requests[0]) == [("user", "How many?", 3)]


def test_file_that_is_no_image_is_named(page, tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    page.choose_files("#files", tmp_path / "notes.txt")
    page.until("document.getElementById('status').innerText.startsWith('notes.txt is no image')")


def test_photo_is_sent_as_it_is_shown(page, server, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    image = Image.new("RGB", (80, 40), "white")
    image.paste("black", (0, 0, 40, 40))
    image.save(tmp_path / "photo.jpg", exif=exif)
    server.plan("A photo.")
    attach(page, tmp_path / "photo.jpg")
    ask(page, "What is it?")
    url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(decoded(url)))
    assert sent.size == (40, 80)
    assert 0x0112 not in sent.getexif()
    assert sent.getpixel((20, 10)) == (0, 0, 0)
    assert sent.getpixel((20, 70)) == (255, 255, 255)


def test_example_can_be_asked(page, server):
    server.plan("A house and a tree.")
    page.click("#example")
    page.until("document.getElementById('question').value")
    page.click("#send")
    wait_for(page, "done")
    assert contents(server.requests[0]) == [("user", "Describe with boxes.", 1)]


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_window(page, server, tmp_path, width):
    page.resize(width, 700)
    outside = f"<ref>{'label' * 9}</ref><box>(900,10),(5000,4000)</box>"
    server.plan("x" * 500 + outside, Answer("long " * 900, status=503))
    files = [image_file(tmp_path / "a.png", (3000, 200)), image_file(tmp_path / "b.png", (9, 99))]
    attach(page, *files)
    ask(page, "y" * 500)
    ask(page, "z", "failed")
    page.click("#open-settings")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    frame, box = page.rectangle(".frame"), page.rectangle(".box")
    assert (box[0] + box[2], box[1] + box[3]) == pytest.approx(
        (frame[0] + frame[2], frame[1] + frame[3]), abs=0.5
    )
    left, _, column, _ = page.rectangle("main")
    assert left >= 0
    assert left + column <= width


def test_theme_follows_the_system_until_it_is_chosen(page, server):
    background = "getComputedStyle(document.body.parentElement).backgroundColor"
    page.prefer("light")
    light = page.value(background)
    page.prefer("dark")
    page.until(f"{background} !== {light!r}")
    page.until("document.getElementById('theme').textContent === 'Light'")
    page.click("#theme")
    assert page.value(background) == light
    page.open(server.address)
    assert page.value(background) == light


def test_every_control_has_a_name(page):
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "spinbutton", "image")
    for node in tree:
        if not node["ignored"] and node["role"]["value"] in roles:
            assert node["name"]["value"], node


def test_policy_allows_no_inline_code_and_no_other_host(page):
    policy = page.value("document.querySelector('meta[http-equiv]').content")
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert not urlsplit(page.value("document.querySelector('script').src")).path.startswith("//")
    assert page.value("document.querySelectorAll('[style], style, script:not([src])').length") == 0
