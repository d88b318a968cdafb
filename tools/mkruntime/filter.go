package main

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/ext4"
	"git.thaloco.com/thaloco/banger/internal/imagebuild"
)

// imageSize counts what a tar needs on an ext4 filesystem.
type imageSize struct {
	inodes int64
	blocks int64
}

// add counts one entry: its inode, the blocks of its content, and its name in a directory.
func (s *imageSize) add(h *tar.Header) {
	if h.Typeflag != tar.TypeLink {
		s.inodes++
	}
	switch h.Typeflag {
	case tar.TypeReg:
		s.blocks += (h.Size + ext4.BlockSize - 1) / ext4.BlockSize
	case tar.TypeDir:
		s.blocks++
	case tar.TypeSymlink:
		if len(h.Linkname) >= 60 { // longer targets do not fit into the inode
			s.blocks++
		}
	}
	if len(h.PAXRecords) > 0 {
		s.blocks++ // extended attributes that do not fit into the inode
	}
}

// rewriteTar reads the root filesystem that packages make and writes the one of the image: without what drop matches, with repl in place
// of what has the same names, and with what is added; and a second tar with the content of /root, whose entries begin at "./": the work seed. Owners, modes, devices,
// hard links and extended attributes pass through untouched.
func rewriteTar(ctx context.Context, in io.Reader, image, seed io.Writer, drop []string, repl []replacement, add addition, now time.Time) (imgSize, seedSize imageSize, err error) {
	replaced := make(map[string]bool, len(repl))
	for _, r := range repl {
		replaced[r.name] = true
	}
	iw, sw := tar.NewWriter(image), tar.NewWriter(seed)
	have := map[string]bool{".": true}

	put := func(h *tar.Header, body io.Reader) error {
		name := path.Clean(h.Name)
		have[name] = true
		writers := []struct {
			w    *tar.Writer
			size *imageSize
			name string
		}{{iw, &imgSize, tarName(name, h.Typeflag)}}
		if name == "root" || strings.HasPrefix(name, "root/") {
			writers = append(writers, struct {
				w    *tar.Writer
				size *imageSize
				name string
			}{sw, &seedSize, tarName(path.Clean(strings.TrimPrefix(strings.TrimPrefix(name, "root"), "/")), h.Typeflag)})
		}
		var sinks []io.Writer
		for _, w := range writers {
			c := *h
			c.Name = w.name
			if err := w.w.WriteHeader(&c); err != nil {
				return err
			}
			w.size.add(&c)
			sinks = append(sinks, w.w)
		}
		if h.Typeflag == tar.TypeReg && body != nil {
			if _, err := io.Copy(io.MultiWriter(sinks...), body); err != nil {
				return err
			}
		}
		return nil
	}

	tr := tar.NewReader(in)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return imgSize, seedSize, err
		}
		name := path.Clean(h.Name)
		if isDropped(drop, name) || replaced[name] || h.Typeflag == tar.TypeDir && name != "." && have[name] {
			continue // a directory comes twice where a filesystem is mounted on it
		}
		// The writer derives the format and the attributes from the header's own fields.
		h.Format = tar.FormatPAX
		for k := range h.PAXRecords {
			if !strings.HasPrefix(k, "SCHILY.xattr.") {
				delete(h.PAXRecords, k)
			}
		}
		h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
		if h.Typeflag == tar.TypeLink {
			h.Linkname = tarName(path.Clean(h.Linkname), tar.TypeReg)
		}
		var body io.Reader = tr
		if text := add.more[name]; text != "" && h.Typeflag == tar.TypeReg {
			h.Size += int64(len(text))
			body = io.MultiReader(tr, strings.NewReader(text))
		}
		if err := put(h, body); err != nil {
			return imgSize, seedSize, err
		}
	}

	// within makes the directories that lead to a name.
	within := func(name string) error {
		var missing []string
		for d := path.Dir(name); !have[d]; d = path.Dir(d) {
			missing = append(missing, d)
		}
		for i := len(missing) - 1; i >= 0; i-- {
			h := &tar.Header{Typeflag: tar.TypeDir, Name: missing[i], Mode: 0o755, ModTime: now, Format: tar.FormatPAX}
			if err := put(h, nil); err != nil {
				return err
			}
		}
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(add.more)) {
		if !have[name] && name != imagebuild.BashrcPath { // of a distribution that is not Debian; ~/.bashrc does it there
			repl = append(repl, replacement{name: name, content: []byte(add.more[name]), mode: 0o644})
		}
	}
	for _, r := range repl {
		if err := within(r.name); err != nil {
			return imgSize, seedSize, err
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: r.name, Mode: r.mode, Size: int64(len(r.content)), ModTime: now, Format: tar.FormatPAX}
		if r.link != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, r.link, 0
		}
		if err := put(h, strings.NewReader(string(r.content))); err != nil {
			return imgSize, seedSize, err
		}
	}
	if add.archive != nil {
		tr, done := add.entries(ctx)
		defer done.Close() // ends who writes it
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return imgSize, seedSize, err
			}
			if err := within(path.Clean(h.Name)); err != nil {
				return imgSize, seedSize, err
			}
			h.ModTime = now
			if err := put(h, tr); err != nil {
				return imgSize, seedSize, err
			}
		}
	}
	return imgSize, seedSize, errors.Join(iw.Close(), sw.Close())
}

// tarName is the form of names that mmdebstrap and GNU tar use: "./etc/", "./etc/passwd".
func tarName(clean string, typeflag byte) string {
	if clean == "." || clean == "" {
		return "./"
	}
	if typeflag == tar.TypeDir {
		return "./" + clean + "/"
	}
	return "./" + clean
}
