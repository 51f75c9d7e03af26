"""Photograph the chat page with SmolLM2: writes chat_page.png beside this file.

It needs Chromium.
"""

import shutil
import threading
import time
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright

import qwen_analog
from qwen_analog.engine import AsyncEngine
from qwen_analog.server import build_app, build_server

HERE = Path(__file__).resolve().parent
QUESTIONS = "What is the capital of France?", "What would I see there on a rainy day?"


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message").fill(question)
    page.keyboard.press("Enter")
    page.wait_for_selector(".writing")
    page.wait_for_selector(".writing", state="detached", timeout=120_000)


torch.set_num_threads(1)
model, tokenizer = qwen_analog.load("smollm2")
engine = AsyncEngine(model, tokenizer, max_context=512)
server = build_server(build_app(engine, "smollm2"), engine, grace_seconds=0)
thread = threading.Thread(target=server.run)
thread.start()
while not server.started:
    time.sleep(0.01)
port = server.servers[0].sockets[0].getsockname()[1]

with sync_playwright() as playwright:
    program = shutil.which("chromium")
    browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
    size = {"width": 1100, "height": 640}
    page = browser.new_page(viewport=size, device_scale_factor=1.5)
    page.goto(f"http://127.0.0.1:{port}/")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("60")
    page.get_by_label("Shade").check()
    for question in QUESTIONS:
        ask(page, question)
    page.locator(".assistant").last.locator(".token", has_text="city").hover()
    page.screenshot(path=HERE / "chat_page.png")
    browser.close()
server.should_exit = True
thread.join()
