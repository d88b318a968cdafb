package oci

import (
	"archive/tar"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Whiteouts of the OCI image specification (layer.md): a member .wh.NAME removes NAME of the layers below,
// .wh..wh..opq everything in its directory. Other names that begin with .wh..wh. are aufs's own.
const (
	whiteout     = ".wh."
	whiteoutMeta = ".wh..wh."
	opaque       = ".wh..wh..opq"
)

// maxLinks is how many symbolic links one path may go through (path_resolution(7)).
const maxLinks = 40

// maxDepth bounds how deep directories lie in each other. Linux takes paths of 4096 bytes.
const maxDepth = 2048

// node is one file of the joined tree. Two names of one file are one node in two places.
type node struct {
	entry
	layer    int // which one has the content; -1 for what banger adds
	own      []byte
	children map[string]*node // of a directory
	names    []string         // in the finished tree, in order
}

func (n *node) isDir() bool { return n.kind == tar.TypeDir }

func newDir(mtime time.Time) *node {
	return &node{entry: entry{kind: tar.TypeDir, mode: 0o755, mtime: mtime}, layer: -1, children: map[string]*node{}}
}

// join makes one tree of the layers.
func (img *Image) join() error {
	img.root = newDir(time.Unix(0, 0))
	for i, l := range img.layers {
		if err := img.apply(i, l.entries); err != nil {
			return err
		}
		l.entries = nil
	}
	return nil
}

// apply puts one layer over those below. Whiteouts first: they are about the layers below only, wherever in
// the archive they are.
func (img *Image) apply(layer int, entries []entry) error {
	for _, e := range entries {
		dir, base := path.Split(e.name)
		if !strings.HasPrefix(base, whiteout) || ofAufs(e.name) && base != opaque {
			continue
		}
		parent, err := img.root.walk(dir, false, time.Time{})
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(base, whiteout)
		switch {
		case base != opaque && (name == "" || name == "." || name == ".."):
			return corrupt("a layer holds the whiteout %q, which removes nothing that can be", e.name)
		case parent == nil || !parent.isDir():
		case base == opaque:
			parent.children = map[string]*node{}
		default:
			delete(parent.children, name)
		}
	}
	for _, e := range entries {
		if strings.HasPrefix(path.Base(e.name), whiteout) || ofAufs(e.name) {
			continue
		}
		if err := img.put(layer, e); err != nil {
			return err
		}
	}
	return nil
}

// ofAufs says whether a name is, or lies in, what aufs keeps for itself.
func ofAufs(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if strings.HasPrefix(part, whiteoutMeta) {
			return true
		}
	}
	return false
}

// put adds one member, as an unpacker that is held within the root would write it: directories on the way are
// made, links on the way are followed, and what has the name is replaced, but a directory by a directory.
func (img *Image) put(layer int, e entry) error {
	if e.name == "" {
		if e.kind != tar.TypeDir {
			return corrupt("a layer replaces the root directory by something else")
		}
		img.root.entry = e
		return nil
	}
	if strings.Count(e.name, "/") >= maxDepth {
		return corrupt("%q... lies more than %d directories deep", e.name[:64], maxDepth)
	}
	dir, base := path.Split(e.name)
	parent, err := img.root.walk(dir, true, e.mtime)
	if err != nil {
		return err
	}
	old := parent.children[base]
	if e.kind == tar.TypeLink {
		target, err := img.linked(e)
		if err != nil {
			return err
		}
		parent.children[base] = target
		return nil
	}
	n := &node{entry: e, layer: layer}
	if n.isDir() {
		n.children = map[string]*node{}
		if old != nil && old.isDir() {
			n.children = old.children
		}
	}
	if old != nil && old.isDir() && n.isDir() {
		old.entry, old.layer = e, layer // a directory has one name, and a link may lead to it by its place only
		return nil
	}
	parent.children[base] = n
	return nil
}

// linked finds the file that a hard link is another name of.
func (img *Image) linked(e entry) (*node, error) {
	dir, base := path.Split(e.link)
	parent, err := img.root.walk(dir, false, time.Time{})
	if err != nil {
		return nil, err
	}
	var target *node
	if parent != nil && base != "" {
		target = parent.children[base]
	}
	switch {
	case target == nil:
		return nil, corrupt("the hard link %q leads to %q, which is not in the image", e.name, e.link)
	case target.isDir():
		return nil, corrupt("the hard link %q leads to %q, which is a directory", e.name, e.link)
	}
	return target, nil
}

// walk goes along a path within the root, through symbolic links, absolute ones and ".." included. What is
// missing is made, as root's, or the result is nil.
func (n *node) walk(dir string, create bool, mtime time.Time) (*node, error) {
	at := []*node{n}
	rest := strings.Split(strings.Trim(dir, "/"), "/")
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		here := at[len(at)-1]
		switch name {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		if !here.isDir() {
			if !create {
				return nil, nil
			}
			return nil, corrupt("%q leads through a file that is no directory", dir)
		}
		next := here.children[name]
		switch {
		case next == nil && !create:
			return nil, nil
		case next == nil:
			if len(name) > maxName || len(at) > maxDepth {
				return nil, corrupt("%.64q... has a name that is too long, or lies too deep", dir)
			}
			next = newDir(mtime)
			here.children[name] = next
		case next.kind == tar.TypeSymlink:
			if links++; links > maxLinks {
				if !create {
					return nil, nil
				}
				return nil, corrupt("%q leads through more than %d symbolic links", dir, maxLinks)
			}
			if strings.HasPrefix(next.link, "/") {
				at = at[:1]
			}
			rest = append(strings.Split(next.link, "/"), rest...)
			continue
		}
		at = append(at, next)
	}
	last := at[len(at)-1]
	if create && !last.isDir() {
		return nil, corrupt("%q leads through a file that is no directory", dir)
	}
	return last, nil
}

// find is the file that a path means to a running system, nil if there is none.
func (n *node) find(p string) *node {
	found, err := n.walk(p, false, time.Time{})
	if err != nil { // only what is made can fail
		return nil
	}
	return found
}

// add puts a file of banger's own in. What the image has at its name, or instead of the directory that it is
// in, gives way: a link there would lead a guest's init elsewhere.
func (img *Image) add(name string, mode int64, content []byte, mtime time.Time) error {
	dir, base := path.Split(path.Clean(name))
	above, own := path.Split(path.Clean(dir))
	parent, err := img.root.walk(above, true, mtime)
	if err != nil {
		return err
	}
	if old := parent.children[own]; old == nil || !old.isDir() {
		parent.children[own] = newDir(mtime)
	}
	parent.children[own].children[base] = &node{own: content, layer: -1,
		entry: entry{kind: tar.TypeReg, mode: mode, mtime: mtime, size: int64(len(content))}}
	return nil
}

// tally is what a tree needs of a filesystem.
type tally struct {
	inodes, blocks int64
	content        int64 // bytes of files
}

// list names every file of the tree below top and returns the nodes in the order of their first names:
// directories before what is in them. top's own name is "".
func list(top *node) ([]*node, error) {
	var all []*node
	seen := map[*node]bool{}
	var visit func(n *node, name string, depth int) error
	visit = func(n *node, name string, depth int) error {
		if depth > maxDepth {
			return fault.New(fault.Corrupt, "", "directories lie more than %d deep in each other", maxDepth)
		}
		if !seen[n] {
			seen[n] = true
			n.names = n.names[:0]
			all = append(all, n)
		}
		n.names = append(n.names, name)
		for _, child := range slices.Sorted(maps.Keys(n.children)) {
			if err := visit(n.children[child], path.Join(name, child), depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	return all, visit(top, "", 0)
}
