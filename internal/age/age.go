// Package age owns the words for how old something is, which the command line and the screen have in common.
//
// It knows nothing of what is old, and never asks a clock.
package age

import (
	"fmt"
	"time"
)

// Text is a duration in its largest unit, rounded down: "12s", "3m", "47h", "9d". Hours go on to two days, since "1d" is
// too coarse for yesterday. What is negative (clocks differ) is "0s".
func Text(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
