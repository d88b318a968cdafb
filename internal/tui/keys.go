package tui

import "slices"

// command is what a key does.
type command int

const (
	doNothing command = iota
	goUp
	goDown
	goPageUp
	goPageDown
	goFirst
	goLast
	switchFocus
	nextPane
	showDetails
	showOperations
	showLogs
	showEvents
	showPorts
	showImages
	zoom
	mark
	markAll
	goBack
	filter
	sortNext
	sortReverse
	newVM
	startVM
	stopVM
	restartVM
	deleteVM
	enterVM
	openPort
	cancelOperation
	activate
	startDaemon
	help
	redraw
	suspend
	quit
)

// binding is what some keys do, for the program and for people: the help, the line at the bottom and
// docs/tui.md are made of it.
type binding struct {
	do    command
	keys  []string // as bubbletea names them
	shown string   // as people do
	text  string
	group string
	short string // on the line at the bottom; empty: not there
}

const (
	groupMove = "Move"
	groupShow = "Show"
	groupVM   = "VMs: those that are marked, else the one under the cursor"
	groupRest = "Everything else"
)

var keyMap = []binding{
	{help, []string{"?", "f1"}, "?", "this help", groupRest, "help"},
	{newVM, []string{"n"}, "n", "make a VM", groupVM, "new"},
	{startVM, []string{"s"}, "s", "start", groupVM, "start"},
	{stopVM, []string{"x"}, "x", "stop; files stay", groupVM, "stop"},
	{restartVM, []string{"r"}, "r", "restart", groupVM, ""},
	{deleteVM, []string{"d", "delete"}, "d", "delete, after a question; in the pane of images: the image", groupVM, "delete"},
	{enterVM, []string{"e"}, "e", "enter by SSH, and come back", groupVM, "enter"},
	{openPort, []string{"o"}, "o", "open its web port, or choose one", groupVM, ""},
	{cancelOperation, []string{"c"}, "c", "cancel what runs on it", groupVM, ""},
	{mark, []string{"space"}, "space", "mark, and go to the next", groupVM, ""},
	{markAll, []string{"a"}, "a", "mark all that are listed, or none", groupVM, ""},
	{goUp, []string{"up", "k"}, "↑ k", "up", groupMove, ""},
	{goDown, []string{"down", "j"}, "↓ j", "down", groupMove, ""},
	{goPageUp, []string{"pgup", "ctrl+b"}, "PgUp", "a page up", groupMove, ""},
	{goPageDown, []string{"pgdown", "ctrl+f"}, "PgDn", "a page down", groupMove, ""},
	{goFirst, []string{"home", "g"}, "Home g", "to the first", groupMove, ""},
	{goLast, []string{"end", "G"}, "End G", "to the last, and follow", groupMove, ""},
	{switchFocus, []string{"tab"}, "Tab", "between list and pane", groupMove, "pane"},
	{activate, []string{"enter"}, "Enter", "in the list: its details; in the pane: open the port, make a VM of the image", groupMove, ""},
	{filter, []string{"/"}, "/", "filter: words in name, state, image, labels", groupShow, "filter"},
	{sortNext, []string{"t"}, "t", "sort by the next column", groupShow, ""},
	{sortReverse, []string{"T"}, "T", "sort the other way round", groupShow, ""},
	{showDetails, []string{"1"}, "1", "details", groupShow, ""},
	{showOperations, []string{"2"}, "2", "operations and their stages", groupShow, ""},
	{showLogs, []string{"3", "l"}, "3 l", "log: console and VMM", groupShow, ""},
	{showEvents, []string{"4"}, "4", "events", groupShow, ""},
	{showPorts, []string{"5", "p"}, "5 p", "ports", groupShow, ""},
	{showImages, []string{"6", "i"}, "6 i", "images", groupShow, ""},
	{nextPane, []string{"shift+tab"}, "Shift-Tab", "the next pane", groupShow, ""},
	{zoom, []string{"z"}, "z", "the pane on the whole screen, and back", groupShow, ""},
	{goBack, []string{"esc"}, "Esc", "back: marks, filter, zoom", groupRest, ""},
	{startDaemon, []string{"D"}, "D", "start the daemon, if it is gone", groupRest, ""},
	{redraw, []string{"ctrl+l"}, "Ctrl-L", "draw everything anew", groupRest, ""},
	{suspend, []string{"ctrl+z"}, "Ctrl-Z", "suspend", groupRest, ""},
	{quit, []string{"q", "ctrl+c"}, "q", "leave; VMs and operations go on", groupRest, "quit"},
}

func commandOf(key string) command {
	for _, b := range keyMap {
		if slices.Contains(b.keys, key) {
			return b.do
		}
	}
	return doNothing
}
