import asyncio

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def test_the_page_may_load_nothing_from_elsewhere_and_leads_to_no_other_file(server, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page/index.html").write_text("<p>page</p>")
    (tmp_path / "page/page.js").write_text("1")
    (tmp_path / "secret.txt").write_text("secret")
    served = server(page=tmp_path / "page")

    async def check():
        async with served.client() as client:
            index = await client.get("/")
            assert (index.status_code, index.text) == (200, "<p>page</p>")
            assert index.headers["content-security-policy"] == POLICY
            assert index.headers["x-content-type-options"] == "nosniff"
            script = await client.get("/page.js")
            assert script.headers["content-type"].startswith("text/javascript")
            for path in ("/secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "/docs"):
                missing = await client.get(path)
                assert missing.status_code == 404
                assert missing.json()["error"]["type"] == "invalid_request_error"

    asyncio.run(check())
