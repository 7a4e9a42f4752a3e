"""Draws docs/chat.png: the demonstration of `make chat`, with the answers that the shipped hybrid gives.

python docs/chat_picture.py
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmmamba.cli.arguments import HYBRID
from mmmamba.cli.chat import DEMO_CONVERSATION, Chat
from mmmamba.examples.shapes.world import conversation


BACKGROUND, TEXT, GREY, BLUE = "#14161c", "#e8eaf0", "#8b93a7", "#7fc8ff"
WIDTH, HEIGHT, MARGIN, LINE = 1200, 430, 40, 32


def main() -> None:
    pictures, turns = conversation("test", 0, DEMO_CONVERSATION)
    picture = pictures[0].draw()
    chat = Chat(HYBRID, "cpu", 64)
    chat.start([picture])

    page = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=22)
    zoom = min((WIDTH // 2 - 2 * MARGIN) / picture.width, (HEIGHT - 2 * MARGIN) / picture.height)
    shown = picture.resize((round(picture.width * zoom), round(picture.height * zoom)), Image.Resampling.BICUBIC)
    page.paste(shown, (MARGIN, (HEIGHT - shown.height) // 2))

    left, top = 2 * MARGIN + shown.width, MARGIN
    pen.text((left, top), "$ make chat", GREY, font)
    top += 2 * LINE
    for question, truth in turns[:3]:
        answer = chat.ask(question, remember=False)
        pen.text((left, top), f"> {question}", BLUE, font)
        pen.text((left, top + LINE), answer, TEXT, font)
        pen.text((left + pen.textlength(answer, font) + 16, top + LINE), f"(right: {truth})", GREY, font)
        top += LINE * 5 // 2
    pen.text((left, top), ">", BLUE, font)
    page.save(Path(__file__).with_name("chat.png"), optimize=True)


if __name__ == "__main__":
    main()
