// The action of a peer, as short as an action can be: writes down when it began (CLOCK_MONOTONIC, ns) and ends.
#include <stdio.h>
#include <time.h>

int main(int argc, char **argv)
{
	struct timespec at;
	FILE *file;

	clock_gettime(CLOCK_MONOTONIC, &at);
	if (argc != 2 || !(file = fopen(argv[1], "w")))
		return 1;
	fprintf(file, "%lld\n", at.tv_sec * 1000000000LL + at.tv_nsec);
	return fclose(file) ? 1 : 0;
}
