package oci

import (
	"archive/tar"
	"strings"
)

// odd is an image of the corpus: what is peculiar about it, its layers, and what the reference unpacker does
// otherwise and why that is right.
type odd struct {
	name   string
	layers [][]file
	// but are names below which the reference differs, with the reason.
	but map[string]string
}

// corpus are the traps of unpacking images, each an image of its own, which must come out as the reference
// unpacker has it, file by file.
func corpus() []odd {
	long := strings.Repeat("long-directory-name-", 8)
	return []odd{
		{name: "plain", layers: [][]file{{m("./", "", mode(0o750)), m("etc/", ""), m("etc/passwd", "root:x:0:0::/root:/bin/sh\n"), m("empty", ""), m("bin/", "", mode(0o1777))}}},
		{name: "owners and modes", layers: [][]file{{
			m("a", "x", owner(1000, 1001), mode(0o640)), m("su", "x", mode(0o4755)), m("sg", "x", mode(0o2755), owner(0, 42)),
			m("big", "x", owner(4_000_000_000, 3_000_000_000)), m("none", "x", mode(0)), m("d/", "", mode(0o2770), owner(7, 8)),
			symlink("l", "a"), m("typed", "x", mode(0o100755)),
		}}},
		{name: "devices", layers: [][]file{{
			m("dev/", ""), m("dev/null", "", kind(tar.TypeChar), device(1, 3), mode(0o666)), m("dev/sda", "", kind(tar.TypeBlock), device(8, 0), mode(0o660), owner(0, 6)),
			m("dev/big", "", kind(tar.TypeChar), device(300, 70000)), m("dev/pipe", "", kind(tar.TypeFifo), mode(0o622)),
		}}},
		{name: "attributes", layers: [][]file{{
			m("ping", "x", mode(0o755), xattr("security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")),
			m("u", "x", xattr("user.note", "a\x00b\xff")), m("d/", "", xattr("user.dir", "yes"), xattr("trusted.thing", "t")),
			m("acl", "x", mode(0o660), xattr("system.posix_acl_access", "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff")),
			m("large", "x", xattr("user.large", strings.Repeat("v", 2000))),
		}}},
		{name: "whiteout of a file", layers: [][]file{{m("a", "1"), m("b", "1"), m("d/", ""), m("d/x", "1")}, {m(".wh.a", ""), m("d/", ""), m("d/.wh.x", "")}}},
		{name: "whiteout of a directory", layers: [][]file{{m("d/", ""), m("d/e/", ""), m("d/e/f", "1"), m("d2", "1")}, {m(".wh.d", "")}}},
		{name: "whiteout of nothing", layers: [][]file{{m("a", "1")}, {m(".wh.b", ""), m("no/", ""), m("no/.wh.c", "")}}},
		{name: "whiteout and new in one layer", layers: [][]file{{m("d/", ""), m("d/old", "1"), m("f", "1")}, {m(".wh.f", ""), m("f", "2"), m("d/", ""), m("d/new", "2")}}},
		{name: "opaque directory", layers: [][]file{{m("d/", ""), m("d/a", "1"), m("d/s/", ""), m("d/s/b", "1")}, {m("d/", ""), m("d/.wh..wh..opq", ""), m("d/c", "2")}}},
		{name: "opaque after the new", layers: [][]file{{m("d/", ""), m("d/a", "1")}, {m("d/", ""), m("d/c", "2"), m("d/.wh..wh..opq", "")}}},
		{name: "file over directory", layers: [][]file{{m("d/", ""), m("d/a", "1")}, {m("d", "file")}}},
		{name: "directory over file", layers: [][]file{{m("d", "file")}, {m("d/", ""), m("d/a", "1")}}},
		{name: "directory over link", layers: [][]file{{m("real/", ""), m("real/a", "1"), symlink("d", "real")}, {m("d/", ""), m("d/b", "2")}}},
		{name: "link over directory", layers: [][]file{{m("d/", ""), m("d/a", "1"), m("real/", "")}, {symlink("d", "real"), m("d/b", "2", at(5))}}, but: map[string]string{"real": "its time: a reference that writes into a directory restores it or not"}},
		{name: "directory again", layers: [][]file{{m("d/", "", mode(0o700), xattr("user.a", "1")), m("d/a", "1")}, {m("d/", "", mode(0o755), owner(5, 5), at(77))}}},
		{name: "duplicate names", layers: [][]file{{m("a", "first"), m("b", "x"), m("a", "second one"), symlink("b", "a"), m("c/", ""), m("c/x", "1"), m("c/", "", mode(0o711))}}},
		{name: "hard links", layers: [][]file{{m("a", "content", mode(0o4755), owner(3, 4)), hardlink("b", "a"), m("d/", ""), hardlink("d/c", "./b"), hardlink("e", "/a")}}},
		{name: "hard link over layers", layers: [][]file{{m("a", "content", owner(9, 9)), m("d/", "")}, {hardlink("d/b", "a")}, {m("a", "replaced")}}},
		{name: "hard link to what is removed", layers: [][]file{{m("a", "content"), hardlink("b", "a")}, {m(".wh.a", "")}}},
		{name: "hard link through a link", layers: [][]file{{m("real/", ""), m("real/a", "x"), symlink("via", "real"), hardlink("b", "via/a")}}},
		{name: "hard link to a symbolic link", layers: [][]file{{m("a", "x"), symlink("l", "a"), hardlink("l2", "l")}}},
		{name: "hard link to a device", layers: [][]file{{m("n", "", kind(tar.TypeChar), device(1, 3)), hardlink("n2", "n")}}},
		{name: "links that are absolute or escape", layers: [][]file{{
			symlink("abs", "/etc/shadow"), symlink("up", "../../../../etc/passwd"), symlink("self", "self"), symlink("dot", "."), symlink("a b\tc", "x y"),
			symlink("longlink", "/"+strings.Repeat("component/", 30)+"end"),
		}}},
		{name: "through links", layers: [][]file{{m("usr/", ""), m("usr/lib/", ""), symlink("lib", "usr/lib"), symlink("abs", "/usr"), m("lib/a", "1"), m("abs/lib/b", "2")}, {m("lib/c", "3")}},
			but: map[string]string{"usr/lib": "its time, as above", "usr": "its time"}},
		{name: "through an escaping link", layers: [][]file{{symlink("out", "/../../../tmp"), m("tmp/", "", mode(0o1777)), m("out/banger-escaped", "x"), symlink("up", "../../.."), m("up/in-root", "y")}},
			but: map[string]string{"tmp": "its time", "": "its time"}},
		{name: "names that climb", layers: [][]file{{m("../../climbed", "x"), m("/absolute", "y"), m("a/", ""), m("a/../../b", "z"), m("./a/./c", "w")}}, but: map[string]string{"": "its time", "a": "its time"}},
		{name: "no parents", layers: [][]file{{m("deep/er/est/file", "x")}}, but: map[string]string{"deep": "their times: nobody says what they are", "": "its time"}},
		{name: "long names", layers: [][]file{{
			m(strings.Repeat("n", 255), "x"), m(long+"/", ""), m(long+"/"+strings.Repeat(long+"/", 8), ""), m(long+"/"+strings.Repeat(long+"/", 8)+strings.Repeat("f", 200), "y"),
			m("gnu-"+strings.Repeat("g", 200), "z", format(tar.FormatGNU)), m("ustar", "u", format(tar.FormatUSTAR)),
		}}, but: map[string]string{long: "times of directories that no member names"}},
		{name: "strange names", layers: [][]file{{
			m("new\nline", "1"), m("quote'\"\\ back", "2"), m("ünï-日本", "3"), m(" lead", "4"), m("-rf", "5"), m("tab\t", "6"), m("*?[", "7"), m("esc\x1b[31m", "8"), m("...", "9"), m("..x", "10"),
		}}},
		{name: "names that are no text", layers: [][]file{{m("latin-\xe4\xf6", "1"), m("\xff\xfe/", ""), m("\xff\xfe/x\x80", "2"), symlink("to\xe4", "latin-\xe4\xf6")}}},
		{name: "times", layers: [][]file{{m("old", "x", at(0)), m("y2038", "x", at(1<<31+5)), m("far", "x", at(9_000_000_000)), m("fraction", "x", func(h *tar.Header) { h.ModTime = then.Add(123456789) })}}},
		{name: "contents", layers: [][]file{{
			m("zeros", strings.Repeat("\x00", 300_000)), m("hole", "begin"+strings.Repeat("\x00", 200_000)+"end"), m("one", "x"), m("block", strings.Repeat("b", 4096)), m("more", strings.Repeat("0123456789abcdef", 70_000)),
		}}},
		{name: "many files", layers: [][]file{many(3000)}},
		{name: "nothing", layers: [][]file{{}}},
		{name: "of aufs", layers: [][]file{{m(".wh..wh.aufs", ""), m(".wh..wh.plnk/", ""), m(".wh..wh.plnk/1.2", "x"), m("a", "1")}},
			but: map[string]string{".wh..wh.aufs": "aufs's own, which Docker leaves out as well", ".wh..wh.plnk": "likewise", ".wh.aufs": "what the reference makes of it", "": "its time"}},
		{name: "home", layers: [][]file{{m("root/", "", mode(0o700)), m("root/.bashrc", "x"), m("root/.ssh/", "", mode(0o700)), symlink("root/l", "/etc")}}},
	}
}

func many(n int) []file {
	files := []file{m("d/", "")}
	for i := range n {
		files = append(files, m("d/"+strings.Repeat(string(rune('a'+i%26)), 1+i%40)+"-"+string(rune('0'+i/1000))+string(rune('0'+i/100%10))+string(rune('0'+i/10%10))+string(rune('0'+i%10)), strings.Repeat("x", i%50)))
	}
	return files
}
