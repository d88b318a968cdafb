// Package sshconfig owns banger's part of a user's SSH configuration: one file of its own in ~/.ssh
// that names every VM, and, if the user wants it, one Include line in ~/.ssh/config.
//
// The file is always written whole, from all VMs, and only if its user has asked for it once: that it is
// there is the record of that. It never changes any other file but for that one line, never overwrites
// a file of that name that banger did not write, and never reads or makes a key.
package sshconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Name is the file's name in ~/.ssh.
const Name = "banger_config"

// includeLine is ours in ~/.ssh/config. A relative path is one in ~/.ssh (ssh_config(5)).
const includeLine = "Include " + Name

// How the file begins. What follows the marks is its own record.
const (
	firstLine        = "# Written by banger; changes to it are lost. `banger ssh-config remove` takes it away."
	installationMark = "# installation: "
	programMark      = "# program: "
)

// Host is one VM.
type Host struct {
	Name    string // without ".vm"
	ID      string
	Alias   string // of its host key
	HostKey string // authorized_keys form, without a comment
}

// Content is what the file says.
type Content struct {
	Installation string
	Program      string   // banger
	Env          []string // NAME=VALUE, by which that program finds this installation
	User         string
	IdentityFile string
	KnownHosts   string // file that Files.Write fills
	Hosts        []Host
}

// Render gives the file's text. fault.Unsupported for a path that ssh's configuration cannot express.
func (c Content) Render() (string, error) {
	for _, s := range append([]string{c.Program, c.IdentityFile, c.KnownHosts}, c.Env...) {
		if strings.ContainsAny(s, "\n\"") {
			return "", fault.New(fault.Unsupported, s, "cannot be written into ssh's configuration")
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s%s\n%s%s\n", firstLine, installationMark, c.Installation, programMark, c.Program)
	hosts := slices.Clone(c.Hosts)
	slices.SortFunc(hosts, func(x, y Host) int { return strings.Compare(x.Name, y.Name) })
	command := "env"
	for _, e := range c.Env {
		command += " " + shellQuote(e)
	}
	command += " " + shellQuote(c.Program) + " internal ssh-proxy"
	for _, h := range hosts {
		fmt.Fprintf(&b, `
Host %s.vm
    HostName %s.vm
    HostKeyAlias %s
    User %s
    ProxyCommand %s %s 22
    ProxyUseFdpass yes
    IdentityFile "%s"
    IdentitiesOnly yes
    UserKnownHostsFile "%s"
    GlobalKnownHostsFile none
    StrictHostKeyChecking yes
    UpdateHostKeys no
    CheckHostIP no
`, h.Name, h.Name, h.Alias, c.User, escape(command), h.ID, escape(c.IdentityFile), escape(c.KnownHosts))
	}
	return b.String(), nil
}

// escape keeps ssh from expanding a percent sign (TOKENS in ssh_config(5)).
func escape(s string) string { return strings.ReplaceAll(s, "%", "%%") }

// shellQuote: ssh runs a ProxyCommand with the user's shell.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// Files are where it lies. Not safe for concurrent use.
type Files struct{ Dir string } // ~/.ssh

// Path of banger's own file.
func (f Files) Path() string { return filepath.Join(f.Dir, Name) }

// Installed returns the program that the file was installed for, "" if there is none.
// fault.Exists if a file of that name is not this installation's.
func (f Files) Installed(installation string) (program string, err error) {
	st, err := os.Lstat(f.Path())
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	foreign := fault.New(fault.Exists, f.Path(), "was not written by banger").WithHint("look at it, and move it away: mv %s %s.old", f.Path(), f.Path())
	if err != nil {
		return "", fault.Wrap(err, fault.Permission, f.Path(), "cannot be looked at: %v", err)
	}
	if !st.Mode().IsRegular() {
		return "", foreign
	}
	b, err := os.ReadFile(f.Path())
	if err != nil {
		return "", fault.Wrap(err, fault.Permission, f.Path(), "cannot be read: %v", err)
	}
	lines := strings.SplitN(string(b), "\n", 4)
	if len(lines) < 4 || lines[0] != firstLine {
		return "", foreign
	}
	owner, ok1 := strings.CutPrefix(lines[1], installationMark)
	program, ok2 := strings.CutPrefix(lines[2], programMark)
	switch {
	case !ok1 || !ok2 || program == "":
		return "", foreign
	case owner != installation:
		return "", fault.New(fault.Exists, f.Path(), "belongs to another installation of banger (%s)", owner).
			WithHint("banger ssh-config remove, in that one, or: rm %s", f.Path())
	}
	return program, nil
}

// Write writes the file and the known hosts if they say something else, making ~/.ssh if need be.
// Installed is the caller's to ask before.
func (f Files) Write(c Content) error {
	text, err := c.Render()
	if err != nil {
		return err
	}
	var known strings.Builder
	for _, h := range c.Hosts {
		fmt.Fprintf(&known, "%s %s\n", h.Alias, h.HostKey)
	}
	if err := os.MkdirAll(f.Dir, 0o700); err != nil {
		return fault.Wrap(err, fault.Permission, f.Dir, "cannot be made: %v", err)
	}
	if err := replace(c.KnownHosts, []byte(known.String()), 0o600); err != nil {
		return err
	}
	return replace(f.Path(), []byte(text), 0o600)
}

// Remove takes the file, and the Include line if it is there, away. Fine if nothing is.
func (f Files) Remove() error {
	if err := f.setInclude(false); err != nil {
		return err
	}
	if err := os.Remove(f.Path()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(err, fault.Permission, f.Path(), "cannot be removed: %v", err)
	}
	return nil
}

// Include puts the line first into ~/.ssh/config, where it counts for every host, and changes nothing else there.
func (f Files) Include() error { return f.setInclude(true) }

// Included says whether ~/.ssh/config has the line.
func (f Files) Included() (bool, error) {
	b, err := os.ReadFile(filepath.Join(f.Dir, "config"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return slices.Contains(strings.Split(string(b), "\n"), includeLine), err
}

func (f Files) setInclude(on bool) error {
	path := filepath.Join(f.Dir, "config")
	// Who keeps the file elsewhere keeps the link to it.
	if followed, err := filepath.EvalSymlinks(path); err == nil {
		path = followed
	}
	old, err := os.ReadFile(path)
	mode := fs.FileMode(0o600)
	switch {
	case err == nil:
		st, err := os.Stat(path)
		if err != nil {
			return fault.Wrap(err, fault.Permission, path, "cannot be looked at: %v", err)
		}
		mode = st.Mode().Perm()
	case !errors.Is(err, fs.ErrNotExist):
		return fault.Wrap(err, fault.Permission, path, "cannot be read: %v", err)
	case !on:
		return nil
	}
	lines := strings.SplitAfter(string(old), "\n")
	at := slices.IndexFunc(lines, func(l string) bool { return strings.TrimSuffix(l, "\n") == includeLine })
	switch {
	case on && at < 0:
		lines = append([]string{includeLine + "\n"}, lines...)
	case !on && at >= 0:
		lines = slices.Delete(lines, at, at+1)
	default:
		return nil
	}
	return replace(path, []byte(strings.Join(lines, "")), mode)
}

// replace changes a file at once or not at all, and leaves alone one that says the same.
func replace(path string, content []byte, mode fs.FileMode) (err error) {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
		return nil
	}
	failed := func(err error) error {
		return fault.Wrap(err, fault.Permission, path, "cannot be written: %v", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".banger-*")
	if err != nil {
		return failed(err)
	}
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return failed(errors.Join(err, os.Remove(tmp.Name())))
	}
	return nil
}
