package client

import (
	"fmt"
	"strings"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

// Visible makes text that came from a guest, or through the daemon, safe to put on a terminal: nothing is
// left of it that a terminal acts upon or that makes text look like other text. A line stays a line.
func Visible(s string) string { return boot.Visible(s) }

// stageTexts says for people what a stage does; programs get its name.
var stageTexts = map[string]string{
	"fetch":                "fetching what it installs",
	"prepare":              "preparing the system",
	"packages":             "installing packages",
	"tools":                "installing mise, opencode and tmux plugins",
	"finish":               "cleaning up",
	"undo":                 "removing what was made",
	"kernel":               "taking in the kernel",
	"root filesystem":      "taking in the root filesystem",
	"work seed":            "taking in the work seed",
	"publish":              "publishing the image",
	"capture":              "capturing the image",
	"write":                "writing the file",
	"unpack":               "unpacking the file",
	"image":                "preparing the image",
	"system disk":          "making the system disk",
	"work disk":            "making the work disk",
	"guest config":         "writing the guest's configuration",
	"vmm":                  "starting the machine",
	"agent":                "booting",
	"enlarge disks":        "enlarging its disks",
	"apply settings":       "applying the settings",
	"trim":                 "giving back what is free on its disks",
	"shutdown":             "shutting down",
	"vmm end":              "ending the machine",
	"guest config removal": "removing the guest's configuration",
	"work disk removal":    "removing the work disk",
	"system disk removal":  "removing the system disk",
	"image removal":        "letting go of the image",
}

// StageText says for people what a stage of an operation does. A stage that is not known is said by its
// name: a newer daemon may have others.
func StageText(name string) string {
	if text, ok := stageTexts[name]; ok {
		return text
	}
	return Visible(name)
}

// WebText is what a web server answered, in words: that it speaks a scheme, and of its page, if it gave one, status and title.
func WebText(scheme string, status int32, title string) string {
	if status == 0 {
		return scheme
	}
	return strings.TrimSpace(fmt.Sprintf("%s %d %s", scheme, status, title))
}
