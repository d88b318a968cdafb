package system

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// SmallPages says whether this process gets no transparent huge pages. Children and the programs that they execute
// are as their parent was (PR_SET_THP_DISABLE of prctl(2)).
func SmallPages() (bool, error) {
	on, err := unix.PrctlRetInt(unix.PR_GET_THP_DISABLE, 0, 0, 0, 0)
	if err != nil {
		return false, fmt.Errorf("PR_GET_THP_DISABLE: %w", err)
	}
	return on != 0, nil
}

// SetSmallPages sets that. A program whose heap is a few hundred KiB otherwise holds two MiB and more of it, once the kernel has
// put a huge page there, which most distributions have it do.
func SetSmallPages(on bool) error {
	n := uintptr(0)
	if on {
		n = 1
	}
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, n, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_THP_DISABLE: %w", err)
	}
	return nil
}
