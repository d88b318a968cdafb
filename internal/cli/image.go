package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

func (a *app) imageCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use: "image", Short: "Make, register and look after the images that VMs are made from",
		Example: `  banger image build --name docker-dev --docker
  banger image register --name local-test --rootfs rootfs.ext4
  banger vm create --image docker-dev`,
	})
	cmd.AddCommand(a.imageListCommand(), a.imageShowCommand(), a.imageBuildCommand(), a.imageRegisterCommand(), a.imagePullCommand(), a.imagePromoteCommand(),
		a.imageExportCommand(), a.imageImportCommand(), a.imageDeleteCommand(), a.imagePruneCommand())
	return cmd
}

// imageView is an image as programs see it.
type imageView struct {
	ID          string     `json:"id"`
	Name        string     `json:"name"`
	SizeBytes   int64      `json:"size_bytes"`
	Kernel      string     `json:"kernel"`
	Managed     bool       `json:"managed"`
	HasWorkSeed bool       `json:"has_work_seed"`
	IsDefault   bool       `json:"is_default"`
	Source      string     `json:"source"`
	CreatedAt   *time.Time `json:"created_at"`
	Packages    string     `json:"packages,omitempty"`
	OwnKernel   bool       `json:"own_kernel"`
	Base        string     `json:"base"`
	WorkSeed    string     `json:"work_seed,omitempty"`
	VMs         []string   `json:"vms"`

	BaseAllocatedBytes     int64 `json:"base_allocated_bytes,omitempty"`
	WorkSeedAllocatedBytes int64 `json:"work_seed_allocated_bytes,omitempty"`

	// Not in `image list`.
	Filesystem    string           `json:"filesystem,omitempty"`
	WorkSeedBytes int64            `json:"work_seed_bytes,omitempty"`
	Config        *imageConfigView `json:"config,omitempty"`
}

// imageConfigView is what an image made for containers says of the programs that run in it.
type imageConfigView struct {
	NoInit      bool              `json:"no_init"`
	Command     []string          `json:"command"`
	Environment map[string]string `json:"environment"`
	User        string            `json:"user"`
	WorkingDir  string            `json:"working_dir"`
}

func viewImageConfig(m *bangerv1.ImageConfig) *imageConfigView {
	if m == nil {
		return nil
	}
	v := &imageConfigView{m.GetNoInit(), append([]string{}, m.GetCommand()...), m.GetEnvironment(), m.GetUser(), m.GetWorkingDir()}
	if v.Environment == nil {
		v.Environment = map[string]string{}
	}
	return v
}

func viewImage(m *bangerv1.Image) *imageView {
	if m == nil {
		return nil
	}
	return &imageView{
		ID: m.GetId(), Name: m.GetName(), SizeBytes: m.GetSizeBytes(), Kernel: m.GetKernel(), Managed: m.GetManaged(),
		HasWorkSeed: m.GetHasWorkSeed(), IsDefault: m.GetIsDefault(), Source: m.GetSource(), CreatedAt: timeOf(m.GetCreatedAt()),
		Packages: m.GetPackages(), OwnKernel: m.GetOwnKernel(), Base: m.GetBase(), WorkSeed: m.GetWorkSeed(), VMs: append([]string{}, m.GetVms()...),
		Filesystem: m.GetFilesystem(), BaseAllocatedBytes: m.GetBaseAllocatedBytes(), WorkSeedAllocatedBytes: m.GetWorkSeedAllocatedBytes(),
		WorkSeedBytes: m.GetWorkSeedBytes(), Config: viewImageConfig(m.GetConfig()),
	}
}

func (a *app) imageListCommand() *cobra.Command {
	return listing(a, &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List all images",
		Example: `  banger image list
  banger image list --sort -size_bytes --output wide
  banger image list --filter managed=false --quiet`,
	}, list[*imageView]{
		fetch: func(ctx context.Context, c *client.Client) ([]*imageView, error) {
			resp, err := c.Images.ListImages(ctx, &bangerv1.ListImagesRequest{})
			var views []*imageView
			for _, im := range resp.GetImages() {
				views = append(views, viewImage(im))
			}
			return views, err
		},
		columns: []column[*imageView]{
			{title: "NAME", of: func(v *imageView) cell { return cell{text: v.Name} }},
			{title: "ID", of: func(v *imageView) cell { return cell{text: shortID(v.ID)} }},
			{title: "SORT", of: func(v *imageView) cell { return cell{text: sortOf(v.IsDefault, v.Managed)} }},
			{title: "SIZE", of: func(v *imageView) cell { return cell{text: formatBytes(v.SizeBytes)} }},
			{title: "ON DISK", of: func(v *imageView) cell { return cell{text: usedText(v.BaseAllocatedBytes + v.WorkSeedAllocatedBytes)} }},
			{title: "VMS", of: func(v *imageView) cell { return cell{text: fmt.Sprint(len(v.VMs))} }},
			{title: "KERNEL", wide: true, of: func(v *imageView) cell { return cell{text: orDash(v.Kernel)} }},
			{title: "SOURCE", wide: true, of: func(v *imageView) cell { return cell{text: orDash(v.Source)} }},
			{title: "CREATED", of: func(v *imageView) cell { return cell{text: ageOf(a.now(), v.CreatedAt)} }},
		},
		empty: "No images. banger doctor says why",
	})
}

// usedText is what an image takes of the host's disk.
func usedText(n int64) string {
	if n == 0 {
		return "-" // not captured yet: that is done when it is used first
	}
	return formatBytes(n)
}

// sortOf says in a word where an image comes from.
func sortOf(isDefault, managed bool) string {
	switch {
	case isDefault:
		return "default"
	case managed:
		return "managed"
	}
	return "registered"
}

// imageArgs wants one image, or at least one.
func imageArgs(one bool) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == 0:
			return usage(cmd, "%s needs an image: its name, id, or the start of its id", cmd.CommandPath())
		case one && len(args) > 1:
			return usage(cmd, "%s takes one image, and got %d", cmd.CommandPath(), len(args))
		}
		return nil
	}
}

// imageResult is what became of one reference.
type imageResult struct {
	Ref   string     `json:"ref"`
	OK    bool       `json:"ok"`
	Image *imageView `json:"image,omitempty"`
	Note  string     `json:"note,omitempty"`
	Error *errorView `json:"error,omitempty"`
}

// eachImage does something at once to every reference, once each. A bad one does not keep the others from it, and each has
// its own result, in the order given. done says what happened in a word.
func (a *app) eachImage(cmd *cobra.Command, refs []string, done string, do func(context.Context, *client.Client, string) (*bangerv1.Image, string, error)) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	views := []imageResult{}
	var failed []error
	seen := map[string]bool{}
	for _, ref := range refs {
		if seen[ref] {
			continue
		}
		seen[ref] = true
		im, note, err := do(cmd.Context(), c, ref)
		views = append(views, imageResult{Ref: ref, OK: err == nil, Image: viewImage(im), Note: note, Error: viewError(err)})
		switch {
		case err != nil:
			failed = append(failed, err)
			if !a.json {
				a.printError(err)
			}
		case !a.json && note != "":
			fmt.Fprintf(a.stdout, "%s: %s\n", im.GetName(), note)
		case !a.json:
			fmt.Fprintf(a.stdout, "%s: %s\n", im.GetName(), done)
		}
	}
	if a.json {
		if err := a.printJSON(views); err != nil {
			return err
		}
	}
	return oneExit(failed)
}

// oneExit is the exit code of a command with several results: the failures' if they agree.
func oneExit(failed []error) error {
	if len(failed) == 0 {
		return nil
	}
	code := exitCode(failed[0])
	for _, err := range failed {
		if exitCode(err) != code {
			code = exitFailed
		}
	}
	return reported{code}
}

const imageRefsHelp = "\n\nAn image is named by its name, its id, or the start of its id. Each has its own result."

func (a *app) imageShowCommand() *cobra.Command {
	return &cobra.Command{
		Use: "show IMAGE...", Short: "Show everything about images",
		Long: "Show everything about images. With --output json it prints an object for one image, an array for several." + imageRefsHelp,
		Example: `  banger image show default
  banger image show docker-dev --output json | jq .base_allocated_bytes`,
		Args: imageArgs(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			get := func(ref string) (*bangerv1.Image, error) {
				r, err := c.Images.GetImage(cmd.Context(), &bangerv1.GetImageRequest{Ref: ref})
				return r.GetImage(), err
			}
			if len(args) == 1 {
				im, err := get(args[0])
				switch {
				case err != nil:
					return err
				case a.json:
					return a.printJSON(viewImage(im))
				}
				return a.printImage(im)
			}
			views := []imageResult{}
			var failed []error
			for i, ref := range args {
				if slices.Contains(args[:i], ref) {
					continue
				}
				im, err := get(ref)
				views = append(views, imageResult{Ref: ref, OK: err == nil, Image: viewImage(im), Error: viewError(err)})
				if err != nil {
					failed = append(failed, err)
				}
				if a.json {
					continue
				}
				if i > 0 {
					fmt.Fprintln(a.stdout)
				}
				if err != nil {
					a.printError(err)
				} else if err := a.printImage(im); err != nil {
					return err
				}
			}
			if a.json {
				if err := a.printJSON(views); err != nil {
					return err
				}
			}
			return oneExit(failed)
		},
	}
}

func (a *app) printImage(im *bangerv1.Image) error {
	var rows [][]cell
	add := func(key, value string) {
		if value != "" {
			rows = append(rows, []cell{{text: key, color: dim}, {text: value}})
		}
	}
	add("name", im.GetName())
	add("id", im.GetId())
	add("sort", sortOf(im.GetIsDefault(), im.GetManaged()))
	add("source", im.GetSource())
	add("packages", im.GetPackages())
	add("filesystem", im.GetFilesystem())
	add("size", diskText(im.GetSizeBytes(), im.GetBaseAllocatedBytes()))
	if im.GetHasWorkSeed() {
		add("work seed", diskText(im.GetWorkSeedBytes(), im.GetWorkSeedAllocatedBytes()))
	} else {
		add("work seed", "none: a VM copies /root of the image at its first start")
	}
	kernel := im.GetKernel()
	if !im.GetOwnKernel() && !im.GetIsDefault() {
		kernel = strings.TrimSpace(kernel + " (that of the default image)")
	}
	add("kernel", kernel)
	if c := im.GetConfig(); c != nil {
		command := make([]string, len(c.GetCommand()))
		for i, word := range c.GetCommand() {
			if command[i] = shown(word); word == "" {
				command[i] = `""`
			}
		}
		runs := "the image's own"
		if c.GetNoInit() {
			runs = "banger's, the image has none"
		}
		add("init", runs)
		add("command", strings.Join(command, " "))
		add("user", shown(c.GetUser()))
		add("directory", shown(c.GetWorkingDir()))
		for i, name := range slices.Sorted(maps.Keys(c.GetEnvironment())) {
			title := "environment"
			if i > 0 {
				title = ""
			}
			rows = append(rows, []cell{{text: title, color: dim}, {text: shown(name + "=" + c.GetEnvironment()[name])}})
		}
	}
	add("content", im.GetBase())
	add("VMs", strings.Join(im.GetVms(), " "))
	add("created", formatAge(a.now(), im.GetCreatedAt()))
	return table(a.stdout, a.color, nil, rows)
}

// shown is a word of somebody else's, who made the image: what a shell would take for something else, or a terminal for a
// command to it, is quoted.
func shown(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r == ' ' || r == '"' || r == '\'' || r == '\\' || !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// filePath is a flag with a file of the user's, which the daemon is told by its absolute path.
type filePath string

func (p *filePath) String() string { return string(*p) }
func (p *filePath) Type() string   { return "PATH" }
func (p *filePath) Set(s string) error {
	if s == "" {
		return errors.New("it is empty")
	}
	abs, err := filepath.Abs(s)
	*p = filePath(abs)
	return err
}

func fileFlag(f *pflag.FlagSet, name, help string) *filePath {
	p := new(filePath)
	f.Var(p, name, help)
	return p
}

func (a *app) imageRegisterCommand() *cobra.Command {
	r := &bangerv1.RegisterImageRequest{}
	cmd := &cobra.Command{
		Use: "register --name NAME --rootfs FILE", Short: "Make an image of files of your own",
		Long: `Make an image of files of your own: a root filesystem, and what else VMs of it need. Nothing of the files is
changed, and they are copied (by sharing blocks where the filesystem can): what happens to them later does not matter.

An image that was registered under the name before is updated: new VMs get the new content, those that exist keep
theirs. Without a kernel its VMs boot with that of the default image.`,
		Example: `  banger image register --name local-test --rootfs rootfs.ext4
  banger image register --name void-exp --rootfs rootfs-void.ext4 --work-seed rootfs-void.work-seed.ext4 --packages packages.void
  banger image register --name mine --rootfs root.ext4 --kernel /boot/vmlinuz-6.12.0 --modules /lib/modules/6.12.0`,
		Args: noArgs,
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.Var((*text)(&r.Name), "name", "name of the image")
	rootfs := fileFlag(f, "rootfs", "root filesystem: ext4, erofs or squashfs, with an init, for amd64")
	seed := fileFlag(f, "work-seed", "ext4 filesystem that /root of new VMs is a copy of")
	kernel := fileFlag(f, "kernel", "kernel, vmlinux or bzImage; goes with --modules")
	initrd := fileFlag(f, "initrd", "initrd to boot with besides banger's own")
	modules := fileFlag(f, "modules", "directory with the kernel's modules; goes with --kernel")
	packages := fileFlag(f, "packages", "list of packages that it was made from, to be shown")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case r.GetName() == "":
			return usage(cmd, "%s needs a --name", cmd.CommandPath())
		case *rootfs == "":
			return usage(cmd, "%s needs a --rootfs", cmd.CommandPath())
		}
		r.Rootfs, r.WorkSeed, r.Kernel = string(*rootfs), string(*seed), string(*kernel)
		r.Initrd, r.Modules, r.Packages = string(*initrd), string(*modules), string(*packages)
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := c.Images.RegisterImage(cmd.Context(), r)
		if err != nil {
			return err
		}
		return a.makeImage(cmd.Context(), c, resp.GetOperation(), "registered")
	}
	return cmd
}

// makeImage follows an operation that makes an image, ends it if the user interrupts, and says what came of it: half of
// an image is of no use to anybody who went away.
func (a *app) makeImage(ctx context.Context, c *client.Client, op *bangerv1.Operation, done string) error {
	last, err := a.followToEnd(ctx, c, op)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(viewImage(last.GetMade()))
	}
	for _, n := range last.GetNotices() {
		fmt.Fprintln(a.stderr, n)
	}
	fmt.Fprintf(a.stdout, "%s: %s\n", subject(last), done)
	return nil
}

// cancelTime bounds how long an interrupted command waits for its operation to undo what it did.
const cancelTime = 2 * time.Minute

// followToEnd is follow for operations that a Ctrl-C is to end: it cancels them, and waits until they have undone what
// they did. A second Ctrl-C ends the program.
func (a *app) followToEnd(ctx context.Context, c *client.Client, op *bangerv1.Operation) (*bangerv1.Operation, error) {
	last, err := a.follow(ctx, c, op, false)
	if !errors.Is(err, errInterrupted) {
		return last, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelTime)
	defer cancel()
	if !a.json {
		fmt.Fprintf(a.stderr, "%s: cancelling\n", subject(op))
	}
	if _, err := c.Operations.CancelOperation(ctx, &bangerv1.CancelOperationRequest{Id: op.GetId()}); err != nil {
		a.goesOn(op)
		return nil, reported{exitInterrupted}
	}
	if last, err := a.follow(ctx, c, op, true); err == nil { // it was faster
		return last, nil
	} else if ctx.Err() != nil {
		a.goesOn(op)
		return nil, reported{exitInterrupted}
	}
	a.printError(errInterrupted)
	return nil, reported{exitInterrupted}
}

func (a *app) imagePromoteCommand() *cobra.Command {
	return &cobra.Command{
		Use: "promote IMAGE...", Short: "Make registered images banger's own",
		Long: `Make registered images banger's own (managed): banger image register does not replace them any more, and
their source is forgotten. Nothing is copied: that was done when they were registered.` + imageRefsHelp,
		Example: `  banger image promote local-test`,
		Args:    imageArgs(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.eachImage(cmd, args, "promoted", func(ctx context.Context, c *client.Client, ref string) (*bangerv1.Image, string, error) {
				r, err := c.Images.PromoteImage(ctx, &bangerv1.PromoteImageRequest{Ref: ref})
				note := ""
				if r.GetAlready() {
					note = "already managed"
				}
				return r.GetImage(), note, err
			})
		},
	}
}

func (a *app) imageDeleteCommand() *cobra.Command {
	return &cobra.Command{
		Use: "delete IMAGE...", Aliases: []string{"rm"}, Short: "Delete images that no VM was made from",
		Long: `Delete images that no VM was made from. VMs that were made from what was under the name before are no obstacle:
they keep what they have.` + imageRefsHelp,
		Example: `  banger image delete docker-dev`,
		Args:    imageArgs(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.eachImage(cmd, args, "deleted", func(ctx context.Context, c *client.Client, ref string) (*bangerv1.Image, string, error) {
				r, err := c.Images.DeleteImage(ctx, &bangerv1.DeleteImageRequest{Ref: ref})
				return r.GetImage(), "", err
			})
		},
	}
}

func (a *app) imageExportCommand() *cobra.Command {
	return &cobra.Command{
		Use: "export IMAGE FILE", Short: "Write an image into a file",
		Long: `Write an image into a new file: its root filesystem, its work seed, and its kernel if it has one of its own. The
file is a tar archive, compressed with zstd, in which every part is named by its SHA-256.`,
		Example: `  banger image export docker-dev docker-dev.tar.zst`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usage(cmd, "%s takes an image and a file", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			resp, err := c.Images.ExportImage(cmd.Context(), &bangerv1.ExportImageRequest{Ref: args[0], Path: path})
			if err != nil {
				return err
			}
			return a.makeImage(cmd.Context(), c, resp.GetOperation(), "written to "+args[1])
		},
	}
}

func (a *app) imageImportCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use: "import FILE", Short: "Make an image of a file that export wrote",
		Example: `  banger image import docker-dev.tar.zst
  banger image import docker-dev.tar.zst --name docker-old`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(cmd, "%s takes one file", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			resp, err := c.Images.ImportImage(cmd.Context(), &bangerv1.ImportImageRequest{Path: path, Name: name})
			if err != nil {
				return err
			}
			return a.makeImage(cmd.Context(), c, resp.GetOperation(), "imported")
		},
	}
	cmd.Flags().Var((*text)(&name), "name", "name of the image (default the one it was exported under)")
	return cmd
}

type pruneView struct {
	DryRun bool     `json:"dry_run"`
	Images []string `json:"images"`
	Files  int32    `json:"files"`
	Bytes  int64    `json:"bytes"`

	Layers     int32 `json:"layers"`
	LayerBytes int64 `json:"layer_bytes"`
	LayersBusy bool  `json:"layers_busy,omitempty"`
}

func (a *app) imagePruneCommand() *cobra.Command {
	r := &bangerv1.PruneImagesRequest{}
	cmd := &cobra.Command{
		Use: "prune", Short: "Remove what no image and no VM needs",
		Long: `Remove captured content that no image and no VM refers to, and the layers of pulled images that are kept for the next
pull. With --unused also images that no VM was made from, except the default one.`,
		Example: `  banger image prune --unused --dry-run
  banger image prune --unused`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			resp, err := c.Images.PruneImages(cmd.Context(), r)
			if err != nil {
				return err
			}
			if a.json {
				view := pruneView{DryRun: r.GetDryRun(), Images: []string{}, Files: resp.GetFiles(), Bytes: resp.GetBytes(),
					Layers: resp.GetLayers(), LayerBytes: resp.GetLayerBytes(), LayersBusy: resp.GetLayersBusy()}
				for _, im := range resp.GetImages() {
					view.Images = append(view.Images, im.GetName())
				}
				return a.printJSON(view)
			}
			done, freed := "deleted", "freed"
			if r.GetDryRun() {
				done, freed = "would be deleted", "would be freed"
			}
			for _, im := range resp.GetImages() {
				fmt.Fprintf(a.stdout, "%s: %s\n", im.GetName(), done)
			}
			if n := resp.GetLayers(); n > 0 {
				fmt.Fprintf(a.stdout, "layers of pulled images, %d of them with %s: %s\n", n, formatBytes(resp.GetLayerBytes()), done)
			}
			if resp.GetLayersBusy() {
				fmt.Fprintln(a.stderr, "an image is being pulled: layers stay")
			}
			fmt.Fprintf(a.stdout, "%s %s\n", formatBytes(resp.GetBytes()+resp.GetLayerBytes()), freed)
			return nil
		},
	}
	cmd.Flags().BoolVar(&r.Unused, "unused", false, "also images that no VM was made from")
	cmd.Flags().BoolVar(&r.DryRun, "dry-run", false, "only say what would be removed")
	return cmd
}
